"""The README and the other pages say what is so."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tract_hub

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/**/*.md")]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
SITE_ONLY = {"contributing.md", "changelog.md"}  # docs/site.py makes them
LINKS = [
    (page, link, anchor)
    for page, text in TEXTS.items()
    for link, anchor in re.findall(r'(?:\]\(|src=")(?!https?:)([^)#"]*)#?([^)"]*)[)"]', text)
]
QUOTES = [
    (page, *quote)
    for page, text in TEXTS.items()
    for quote in re.findall(r"<!-- evidence:\w+ from (\S+) -->(.*?)<!-- end -->", text, re.DOTALL)
]
FIGURE = re.compile(r"[+-]?\d+\.\d+")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize(("page", "link", "anchor"), LINKS, ids=lambda p: getattr(p, "name", p))
def test_every_local_link_leads_somewhere(page: Path, link: str, anchor: str) -> None:
    if link in SITE_ONLY:
        page, link = ROOT / "README.md", link.removesuffix(".md").upper() + ".md"
    target = page.parent / link if link else page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {(page.parent / link).resolve() for page, link, _ in LINKS if link}
    pages = {page for page in PAGES if page.parent in (ROOT, ROOT / "docs")}
    assert pages - linked == {ROOT / "README.md"}


@pytest.mark.parametrize(("page", "source", "text"), QUOTES, ids=lambda p: getattr(p, "name", ""))
def test_every_figure_stands_in_the_result_file_that_its_block_names(
    page: Path, source: str, text: str
) -> None:
    result = (ROOT / source).read_text(encoding="utf-8")
    figures = FIGURE.findall(text)
    assert figures
    assert [figure for figure in figures if figure not in FIGURE.findall(result)] == []


def test_the_page_of_comparisons_shows_what_their_tables_hold() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "studies" / "evidence.py"))
    page = (ROOT / "docs" / "results" / "studies.md").read_text(encoding="utf-8")
    written = "".join(map(script["section"], script["STUDIES"]))
    assert written
    assert page.partition("<!-- comparisons -->\n")[2] == written


def test_the_readme_shows_what_to_add_to_a_script(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    scope = {
        "Trainer": Trainer,
        "args": TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        "dataset": [],
        "loader": [(torch.randn(4, 3, 32, 32), torch.arange(4))],
    }
    plain, loop, trainer = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    for added in (plain, loop, trainer):
        if added is trainer:
            scope["model"] = ResNetForImageClassification(config)
        exec(re.sub(r"^[+ ] ", "", added, flags=re.MULTILINE), scope)
        model = scope["model"]
        assert isinstance(model, nn.Module)
        assert tract_hub.status(model)


def test_the_quick_start_shows_the_status_that_there_is() -> None:
    text = TEXTS[ROOT / "docs" / "index.md"]
    scope: dict[str, object] = {}
    block, shown = re.findall(
        r"```(?:python)?\n((?:import timm|first layer).*?)```", text, re.DOTALL
    )
    exec(block, scope)
    assert str(tract_hub.status(scope["model"])) == shown.strip()  # type: ignore[arg-type]


def texts() -> str:
    """All texts of the package's code, with ``…`` for what an f-string fills in."""
    found = []
    for path in (ROOT / "tract_hub").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_of_the_page_is_one_of_the_code() -> None:
    page = TEXTS[ROOT / "docs" / "troubleshooting.md"]
    messages = re.findall(r"^\| `(.+?)`", page, re.MULTILINE)
    code = texts()
    assert len(messages) > 10
    assert [message for message in messages if message not in code] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings_handlers.python", reason="the extra docs is not installed")
    pytest.importorskip("material", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    built = subprocess.run(
        [*command, "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "api" / "index.html").exists()
