"""Each part of the package imports only what it may know."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tract_hub"

SHARED = {"config", "errors", "names", "stem"}
# Part → what it may import besides itself; of several that fit a module, the longest name counts.
MAY_IMPORT = {
    "": {*SHARED, "locator", "attach", "integrations"},
    "config": set(),
    "errors": set(),
    "names": set(),
    "stem": set(),
    "method": {"config", "errors"},
    # method.calls says what a call of a layer is, without any mathematics.
    "locator": {"errors", "names", "stem", "method.calls"},
    "attach": {*SHARED, "locator", "method"},
    "integrations": {*SHARED, "", "attach"},
    "launch": {*SHARED, "", "attach", "locator"},
    "studies": {*SHARED, "", "attach", "locator", "method"},
    "cli": {"", "errors", "names", "studies"},
    "__main__": {"cli"},
}
KNOW_ONLY_TORCH = ("method", "attach", "config", "errors", "names", "stem")


def belongs(module: str, part: str) -> bool:
    return module == part or (part != "" and module.startswith(f"{part}."))


def files(part: str) -> list[Path]:
    inner = PACKAGE.joinpath(*part.split("."))
    return sorted(inner.rglob("*.py")) if inner.is_dir() else [inner.with_suffix(".py")]


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of each module that a file imports, also below a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield str(node.module)


def test_no_part_imports_what_it_must_not_know() -> None:
    wrong, seen = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        module = module.removesuffix("__init__").removesuffix(".")
        allowed = {module.partition(".")[0]}
        allowed |= MAY_IMPORT[max((part for part in MAY_IMPORT if belongs(module, part)), key=len)]
        for name in imports(path):
            if name.partition(".")[0] == "tract_hub":
                seen += 1
                imported = name.removeprefix("tract_hub").removeprefix(".")
                if not any(belongs(imported, part) for part in allowed):
                    wrong.append(f"{module} imports {imported}")
    assert seen > 100  # were none read, none would be wrong
    assert wrong == []


@pytest.mark.parametrize("part", KNOW_ONLY_TORCH)
def test_of_other_packages_the_core_knows_only_torch(part: str) -> None:
    for path in files(part):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert tops <= {*sys.stdlib_module_names, "torch", "tract_hub"}, path
