"""The README and the other pages say what is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import tract_hub

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COPY = runpy.run_path(str(ROOT / "scripts" / "copy_results.py"))
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/**/*.md")]
LINKS = [
    (page, link)
    for page in PAGES
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("page", COPY["PAGES"])
def test_the_results_shown_are_those_in_the_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- from " in text
    assert COPY["with_results"](text) == text, "run scripts/copy_results.py"


def test_no_other_page_shows_results() -> None:
    marked = {str(page.relative_to(ROOT)) for page in PAGES if "<!-- from " in page.read_text()}
    assert marked == set(COPY["PAGES"])


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
