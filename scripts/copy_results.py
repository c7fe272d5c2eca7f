"""Copy the results that the pages show out of their files: ``python scripts/copy_results.py``.

A block between ``<!-- from FILE -->`` and ``<!-- end -->`` holds the file, without its heading;
``<!-- from FILE, Section -->`` the table of one section; ``<!-- from FOLDER -->`` the first tables
of all the folder's pages as one, each row named after its page.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/method-card.md", "docs/guidance.md")
BLOCK = re.compile(r"(<!-- from ([^,\n]+?)(?:, ([^\n]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def with_results(page: str) -> str:
    """Return the text with every marked block as its file stands now."""
    return BLOCK.sub(
        lambda block: f"{block[1]}\n{_shown(ROOT / block[2], block[3])}\n\n{block[4]}", page
    )


def _shown(path: Path, section: str | None) -> str:
    if path.is_dir():
        return _joined(sorted(path.glob("*.md")))
    text = path.read_text(encoding="utf-8")
    if section is None:
        return "\n".join(line for line in text.splitlines() if not line.startswith("# ")).strip()
    return "\n".join(_table(text.split(f"## {section}\n", 1)[1]))


def _table(text: str) -> list[str]:
    """The lines of the table in a section."""
    body = text.split("\n## ", 1)[0]
    return [line for line in body.splitlines() if line.startswith("|")]


def _joined(pages: list[Path]) -> str:
    lines: list[str] = []
    for page in pages:
        head, rule, *rows = _table(page.read_text(encoding="utf-8"))
        lines = lines or [f"| {head}", f"|---{rule}"]
        lines += [f"| {page.stem} {row}" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(with_results(path.read_text(encoding="utf-8")), encoding="utf-8")
