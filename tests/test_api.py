"""The public names: a change here breaks users, and belongs in CHANGELOG.md."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from torch import nn

import tract_hub

FUNCTIONS = ("disable", "enable", "finish", "locate", "measure", "optimizer_factory", "status")
CLASSES = ("Status", "Stem", "StemStatus", "TractCallback")
ERRORS = ("ExampleInputError", "StemNotFoundError", "UnsupportedStemError")


def test_these_names_and_no_others_are_public() -> None:
    errors = (*ERRORS, "TractError", "TractWarning")
    assert sorted(tract_hub.__all__) == sorted((*FUNCTIONS, *CLASSES, *errors))
    assert set(tract_hub.__all__) <= set(dir(tract_hub))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_shows_how_it_is_called(name: str) -> None:
    assert "Example:" in getattr(tract_hub, name).__doc__


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_a_tract_error(name: str) -> None:
    assert issubclass(getattr(tract_hub, name), tract_hub.TractError)


def test_what_is_found_and_what_is_on_cannot_be_changed() -> None:
    model = tract_hub.enable(nn.Conv2d(3, 4, 3))
    for record in (*tract_hub.locate(model), *tract_hub.status(model)):
        with pytest.raises(FrozenInstanceError):
            record.weight_name = "other"


@pytest.mark.parametrize("function", [tract_hub.enable, tract_hub.disable, tract_hub.status])
def test_what_is_no_model_is_refused(function) -> None:
    with pytest.raises(TypeError, match=rf"{function.__name__} takes a torch\.nn\.Module, got str"):
        function("resnet18")
