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


def test_the_snippets_run_one_after_the_other(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    scope = {"args": args, "data": [], "Trainer": Trainer}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(snippet, scope)
    assert tract_hub.status(scope["model"])
    scope["trainer"].create_optimizer()
    assert scope["trainer"].optimizer.param_groups
