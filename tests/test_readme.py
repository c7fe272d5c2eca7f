"""The README says what is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import tract_hub

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_results_shown_are_those_in_the_files() -> None:
    update = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    assert update["with_results"](README) == README, "run scripts/update_readme.py"


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_every_local_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).is_file()


def test_the_snippet_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(snippet, scope)
    assert tract_hub.status(scope["model"])
