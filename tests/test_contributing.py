"""The steps of CONTRIBUTING.md for a new zoo lead there, as they are written."""

from __future__ import annotations

import importlib
import re
import textwrap
from pathlib import Path

import pytest

import tract_hub
from tract_hub.locator import zoos
from tract_hub.locator.zoos import lookup

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = [
    textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", TEXT, re.M | re.S)
]


def test_a_new_zoo_needs_these_steps_and_no_more(tmp_path, monkeypatch) -> None:
    library, zoo, test = BLOCKS
    (tmp_path / "kites.py").write_text(library, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    kites = importlib.import_module("kites")
    with pytest.raises(tract_hub.ExampleInputError, match=r"KiteNet could not be run on the inp"):
        tract_hub.locate(kites.KiteNet())

    folder = tmp_path / "zoos"
    folder.mkdir()
    (folder / "kites.py").write_text(zoo, encoding="utf-8")
    monkeypatch.setattr(zoos, "__path__", [*zoos.__path__, str(folder)])
    monkeypatch.setitem(lookup.ZOOS, *re.search(r'`"(\w+)": "(\w+)"`', TEXT).groups())
    scope: dict[str, object] = {}
    exec(test, scope)
    (run,) = (value for name, value in scope.items() if name.startswith("test_"))
    run()
