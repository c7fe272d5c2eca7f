"""Copy the results that README.md shows out of their files: ``python scripts/update_readme.py``.

A block between ``<!-- from FILE -->`` and ``<!-- end -->`` holds the file, without its heading;
``<!-- from FILE, Section -->`` the table of one section.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- from ([^,\n]+?)(?:, ([^\n]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def with_results(readme: str) -> str:
    """Return the text with every marked block as its file stands now."""
    return BLOCK.sub(
        lambda block: f"{block[1]}\n{_shown(block[2], block[3])}\n\n{block[4]}", readme
    )


def _shown(file: str, section: str | None) -> str:
    text = (ROOT / file).read_text(encoding="utf-8")
    if section is None:
        return "\n".join(line for line in text.splitlines() if not line.startswith("# ")).strip()
    body = text.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    return "\n".join(line for line in body.splitlines() if line.startswith("|"))


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_results(path.read_text(encoding="utf-8")), encoding="utf-8")
