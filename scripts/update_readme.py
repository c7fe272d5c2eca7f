"""Copy the result files that README.md shows into it: ``python scripts/update_readme.py``."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_results(readme: str) -> str:
    """Return the text with every marked block as its file stands now."""

    def fill(block: re.Match[str]) -> str:
        text = (ROOT / block[2]).read_text(encoding="utf-8")
        body = "\n".join(line for line in text.splitlines() if not line.startswith("# "))
        return f"{block[1]}\n{body.strip()}\n\n{block[3]}"

    return BLOCK.sub(fill, readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_results(path.read_text(encoding="utf-8")), encoding="utf-8")
