"""The steps of CONTRIBUTING.md for a new zoo lead there, as they are written."""

from __future__ import annotations

import importlib
import re
import textwrap
from pathlib import Path

import pytest
import torch

import tract_hub
from tract_hub.locator import zoos
from tract_hub.locator.zoos import lookup

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = [
    textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", TEXT, re.M | re.S)
]


@pytest.fixture
def kites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The made-up library, where no adapter knows it."""
    (tmp_path / "kites.py").write_text(BLOCKS[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("kites")


def test_without_an_adapter_it_is_as_the_first_step_says(kites) -> None:
    model = kites.KiteNet()
    with pytest.raises(tract_hub.ExampleInputError, match=r"KiteNet could not be run on the inp"):
        tract_hub.locate(model)
    flight = {"pictures": torch.zeros(2, 3, 8, 8, 3), "wind": torch.zeros(2, 3, 2)}
    found = [stem.weight_name for stem in tract_hub.locate(model, flight)]
    assert found == ["stem.weight"]


def test_with_the_adapter_its_test_passes(kites, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "locator"
    folder.mkdir()
    (folder / "kites.py").write_text(BLOCKS[1], encoding="utf-8")
    monkeypatch.setattr(zoos, "__path__", [*zoos.__path__, str(folder)])
    monkeypatch.setitem(lookup.ZOOS, *re.search(r'`"(\w+)": "(\w+)"`', TEXT).groups())
    scope: dict[str, object] = {}
    exec(BLOCKS[2], scope)
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()
