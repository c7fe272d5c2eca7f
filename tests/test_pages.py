"""The README and the other pages say what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tract_hub

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/**/*.md")]
LINKS = [
    (page, link)
    for page in PAGES
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda part: getattr(part, "name", part))
def test_every_local_link_leads_somewhere(page: Path, link: str) -> None:
    assert (page.parent / link).exists()


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {(page.parent / link).resolve() for page, link in LINKS}
    assert {page for page in PAGES if page.resolve() not in linked} == {ROOT / "README.md"}


def test_the_snippets_run_one_after_the_other(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    scope = {"args": args, "data": [], "Trainer": Trainer}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(snippet, scope)
    assert tract_hub.status(scope["model"])
    scope["trainer"].create_optimizer()
    assert scope["trainer"].optimizer.param_groups
