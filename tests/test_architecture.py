"""docs/architecture.md and its map show the code as it is, and its parts know what they may."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tract_hub

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tract_hub"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
DRAW = runpy.run_path(str(ROOT / "scripts" / "draw_architecture.py"))

SHARED = {"config", "errors", "names", "stem"}
# Part → what it may import besides itself; of several that fit a module, the longest name counts.
MAY_IMPORT = {
    "": {*SHARED, "locator.locate", "surgery", "integrations.trainer"},
    "config": set(),
    "errors": set(),
    "names": set(),
    "stem": set(),
    "method": {"errors"},
    # method.operations says what a call of a layer is, without any mathematics.
    "locator": {"errors", "names", "stem", "method.operations"},
    # The one import upwards: scope="global" asks which wrapper averages gradients.
    "surgery": {*SHARED, "locator", "method", "integrations.synchronisers"},
    "integrations": {*SHARED, "surgery", "locator", "method"},
    "launch": {*SHARED, "integrations"},
    "studies": {*SHARED, ""},
    "studies.audit": {*SHARED, "", "locator"},  # reports on the locator
    "studies.inspect": {*SHARED, "", "locator", "method.count"},  # and counts operations
    "studies.bench": {*SHARED, "", "method"},  # puts clocks into the method
    "studies.compare.optim": {*SHARED, "", "integrations.trainer.stem_group"},  # an SGD stem
    "commands": {*SHARED, "studies"},
    "cli": {"errors", "commands"},
    "__main__": {"cli"},
}
KNOW_ONLY_TORCH = ("method", "surgery", "config", "errors", "names", "stem", "locator.trace")


def belongs(module: str, part: str) -> bool:
    return module == part or (part != "" and module.startswith(f"{part}."))


def rule_for(module: str) -> set[str]:
    (longest,) = sorted((part for part in MAY_IMPORT if belongs(module, part)), key=len)[-1:]
    return MAY_IMPORT[longest] | {module.partition(".")[0]}


def test_no_part_imports_what_it_must_not_know() -> None:
    found = list(DRAW["imports"]())
    assert len(found) > 200  # were none read, none would be wrong
    wrong = [
        f"{module} imports {imported}"
        for module, imported in found
        if not any(belongs(imported, allowed) for allowed in rule_for(module))
    ]
    assert wrong == []


@pytest.mark.parametrize("part", KNOW_ONLY_TORCH)
def test_of_other_packages_the_core_knows_only_torch(part: str) -> None:
    inner = PACKAGE.joinpath(*part.split("."))
    for path in sorted(inner.rglob("*.py")) if inner.is_dir() else [inner.with_suffix(".py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            tops = {name.partition(".")[0] for name in names}
            assert tops <= {*sys.stdlib_module_names, "torch", "tract_hub"}, path


def test_the_map_is_drawn_from_the_imports_as_they_are() -> None:
    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert drawn == DRAW["svg"](), "run scripts/draw_architecture.py"


ROWS = re.findall(r"^\| \d+ \| `(\S+)` \| `(\w+)` \|", PAGE, re.MULTILINE)


def test_every_folder_and_file_of_the_package_is_on_the_page() -> None:
    tops = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py"}
    folders = {path.name + "/" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert {name for name in tops | folders if f"`{name}`" not in PAGE} == set()


def test_a_batch_goes_through_the_code_in_the_order_of_the_page() -> None:
    """Each row's function runs, and for the first time after that of the row above."""
    model = tract_hub.enable(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)))
    seen: dict[tuple[str, str], None] = {}

    def note(frame, event, _) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            seen.setdefault((path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name))

    loss = torch.nn.functional.cross_entropy
    sys.setprofile(note)
    try:
        loss(model(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1])).backward()
    finally:
        sys.setprofile(None)
    order = [list(seen).index(row) if row in seen else None for row in ROWS]
    assert len(order) > 8
    assert None not in order, [row for row in ROWS if row not in seen]
    assert order == sorted(order), list(seen)
