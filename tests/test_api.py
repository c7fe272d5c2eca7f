"""The public API: a change here breaks users, and belongs in CHANGELOG.md."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import tract_hub

ROOT = Path(__file__).parent.parent
WHERE = "stems: 'Sequence[str | Stem] | None' = None"
FUNCTIONS = {
    "enable": "(model: 'Model', lam: 'float' = 0.1, "
    f"{WHERE}, scope: 'Scope' = 'rank', example_inputs: 'Any' = None, "
    "rows: 'float' = 1.0) -> 'Model'",
    "disable": "(model: 'Model') -> 'Model'",
    "locate": "(model: 'nn.Module', example_inputs: 'Any' = None) -> 'tuple[Stem, ...]'",
    "status": "(model: 'nn.Module') -> 'tuple[StemStatus, ...]'",
    "optimizer_factory": "(args: 'TrainingArguments', lam: 'float' = 0.1, scope: 'Scope' = 'rank', "
    f"{WHERE}, example_inputs: 'Any' = None, stem_lr: 'float | None' = None, "
    "stem_weight_decay: 'float | None' = None, stem_optimizer: 'StemOptimizer | None' = None) "
    "-> 'tuple[type[OptimizerFactory], dict[str, Any]]'",
    "TractCallback": "(lam: 'float | None' = None, scope: 'Scope' = 'rank', "
    f"{WHERE}, example_inputs: 'Any' = None) -> 'None'",
}
RECORDS = {
    "Stem": "weight_name module_name module in_features operation geometry path sites uses derived "
    "notes reason",
    "StemStatus": "weight_name lam scope rows frozen training",
    "TractConfig": "lam scope rows",
}
ERRORS = {
    "TractError": Exception,
    "StemNotFoundError": tract_hub.TractError,
    "UnsupportedStemError": tract_hub.TractError,
    "ExampleInputError": tract_hub.TractError,
    "TractWarning": UserWarning,
}


def test_these_names_and_no_others_are_public() -> None:
    assert set(tract_hub.__all__) == {*FUNCTIONS, *RECORDS, *ERRORS}
    assert all(getattr(tract_hub, name).__doc__ for name in tract_hub.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functions_signature(name: str) -> None:
    assert str(inspect.signature(getattr(tract_hub, name))) == FUNCTIONS[name]


@pytest.mark.parametrize("name", RECORDS)
def test_the_fields_of_a_record(name: str) -> None:
    kind = getattr(tract_hub, name)
    assert [field.name for field in fields(kind)] == RECORDS[name].split()
    assert kind.__dataclass_params__.frozen


@pytest.mark.parametrize("name", ERRORS)
def test_what_an_error_is_derived_from(name: str) -> None:
    assert getattr(tract_hub, name).__bases__ == (ERRORS[name],)


@pytest.mark.parametrize("name", [*FUNCTIONS, *RECORDS, *ERRORS])
def test_the_page_has_it(name: str) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{name}[(`]", page, re.MULTILINE)
