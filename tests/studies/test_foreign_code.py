"""No code comes with a model or its weights: a folder's own Python files are never run."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import tract_hub
from tests.studies.comparisons import TINY
from tract_hub.cli import main

PACKAGE = Path(tract_hub.__file__).parent


@pytest.fixture(params=["unknown type", "known type"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model folder whose Python file leaves a trace when it is run."""
    path = tmp_path / "custom"
    path.mkdir()
    names = dict.fromkeys(("AutoConfig", "AutoModel"), "mine.Mine")
    names["AutoModelForImageClassification"] = "mine.Mine"
    kind = "mine" if request.param == "unknown type" else "vit_mae"
    (path / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": names}))
    (path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    return path


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_a_folder_with_code_of_its_own_never_runs_it(command, folder, capsys) -> None:
    arguments = [str(folder)] if command == "inspect" else [*TINY[10:], "--model", str(folder)]
    with pytest.raises(SystemExit) as stop:
        main([command, *arguments])
    line = capsys.readouterr().err
    known = "vit_mae" in (folder / "config.json").read_text()
    # Transformers' own class is taken where it has one for the type.
    assert stop.value.code == (0 if known and command == "inspect" else 2)
    assert stop.value.code == 0 or "code of its own" in line
    assert not (folder.parent / "ran").exists()


def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call in the package: the file, what is called, and the call."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                found.append((path.name, ast.unparse(node.func), node))
    return found


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    forbidden = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "yaml.load"}
    assert [(file, name) for file, name, _ in calls() if name in forbidden] == []


def test_nothing_in_the_package_trusts_remote_code() -> None:
    loading = ("from_pretrained", "from_config")
    for file, name, call in calls():
        trusted = [k.value for k in call.keywords if k.arg == "trust_remote_code"]
        assert all(ast.literal_eval(value) is False for value in trusted), (file, name)
        if name.startswith("Auto") or ".Auto" in name:
            assert not name.endswith(loading) or trusted, (file, name)
