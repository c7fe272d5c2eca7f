"""Whatever the public functions are given: they work, or say what is wrong and change nothing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tract_hub
from tract_hub.errors import TractError

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)


class Net(nn.Module):
    """Statistics that a forward would move, and dropout that would draw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))


class Awkward:
    """Compares with nothing."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")


@cache
def foreign_stem() -> tract_hub.Stem:
    """A stem of another model."""
    return tract_hub.locate(nn.Sequential(nn.Conv2d(3, 4, 3)))[0]


def own_stem() -> tract_hub.Stem:
    return tract_hub.locate(Net())[0]


NUMBERS = [True, 0, -1, 0.1, 10**400, float("nan"), float("inf"), 1e-320, 1e308, 1j]
NUMBERS += [Fraction(1, 10), np.float32(0.1), np.float64(0.1), np.array([1.0, 2.0])]
NAMES = [
    "",
    "x",
    ".",
    "conv",
    "conv.",
    "conv.weight",
    "norm",
    "head",
    "local",
    "global",
    "relative",
    b"conv",
]
OBJECTS = [None, object(), Awkward(), Net, nn.Conv2d(3, 4, 3), torch.tensor(0.1), torch.zeros(2)]
IMAGES = [
    torch.zeros(2, 3, 8, 8),
    torch.zeros(2, 3, 8, 8, requires_grad=True),
    torch.zeros(2, 3, 8, 8, device="meta"),
    torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    torch.zeros(2, 3, 8, 8, dtype=torch.int64),
    torch.zeros(2, 3, 8, 8, dtype=torch.complex64),
    torch.zeros(2, 3, 8, 8).to_sparse(),
    torch.zeros(0, 3, 8, 8),
    torch.zeros(3, 8, 8),
    torch.zeros(2, 1, 8, 8),
    torch.zeros(2, 3, 1, 1),
    torch.zeros(()),
]
scalars = (
    st.sampled_from([*NUMBERS, *NAMES, *OBJECTS, *IMAGES])
    | st.builds(foreign_stem)
    | st.builds(own_stem)
    | st.builds(tract_hub.Stem, st.just("a"), st.just("a"), st.just(Net()), st.just(3), st.just(""))
    | st.floats()
    | st.integers()
    | st.text(max_size=5)
)
anything = scalars | st.recursive(
    st.lists(scalars, max_size=3)
    | st.tuples(scalars)
    | st.dictionaries(st.sampled_from(["x", "y", "conv", 1]), scalars, max_size=2)
    | st.builds(iter, st.lists(scalars, max_size=2))
    | st.builds(range, st.integers(0, 3)),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)


def everything_about(model: nn.Module) -> tuple:
    """Bits, hooks, attributes, flags, gradients, and the random state."""
    bits = {key: value.numpy().tobytes() for key, value in model.state_dict().items()}
    modules = {
        name: (
            type(module),
            sorted(module.__dict__),
            {key: tuple(table.items()) for key, table in module.__dict__.items() if "hooks" in key},
            {key: id(parameter) for key, parameter in module._parameters.items()},
            module.training,
        )
        for name, module in model.named_modules()
    }
    gradients = [parameter.grad for parameter in model.parameters()]
    return bits, modules, gradients, torch.get_rng_state().tolist()


@contextlib.contextmanager
def said_or_done(model: nn.Module):
    """An error is one of the kinds allowed, speaks for itself, and leaves the model alone."""
    before = everything_about(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (TractError, ValueError, TypeError) as error:
            raised = error.__traceback__
            while raised.tb_next:
                raised = raised.tb_next
            assert len(str(error)) > 15, repr(error)
            assert "tract_hub" in raised.tb_frame.f_code.co_filename, "not an error of its own"
            assert everything_about(model) == before


KEYWORDS = ["lam", "stems", "scope", "damping", "pixels", "example_inputs"]


@pytest.mark.parametrize("enabled", [False, True])
@given(keyword=st.sampled_from(KEYWORDS), value=anything)
@EXAMPLES
def test_enable(enabled: bool, keyword: str, value: Any) -> None:
    model = tract_hub.enable(Net()) if enabled else Net()
    with said_or_done(model):
        tract_hub.enable(model, **{keyword: value})
        assert tract_hub.status(model), "a silent no-op"


@given(value=anything)
@EXAMPLES
def test_locate(value: Any) -> None:
    model = Net()
    before = everything_about(model)
    with said_or_done(model):
        assert [stem.weight_name for stem in tract_hub.locate(model, value)] == ["conv.weight"]
    assert everything_about(model) == before


@pytest.mark.parametrize(
    "function", [tract_hub.enable, tract_hub.disable, tract_hub.status, tract_hub.locate]
)
@given(value=anything.filter(lambda value: not isinstance(value, nn.Module)))
@EXAMPLES
def test_what_is_no_model(function: Callable[..., Any], value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{function.__name__} takes a torch\.nn\.Module, got"):
        function(value)


def test_stems_that_can_be_read_only_once_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a list"):
        tract_hub.enable(Net(), stems=iter(["conv"]))


@pytest.mark.parametrize(
    "stem", [foreign_stem(), tract_hub.Stem("conv.weight", "conv", Net().conv, 27, "conv2d")]
)
def test_a_stem_that_the_model_does_not_have_is_refused_before_anything(stem) -> None:
    model = Net()
    with said_or_done(model), pytest.raises(tract_hub.StemNotFoundError, match="locate"):
        tract_hub.enable(model, stems=[own_stem(), stem])
    assert not tract_hub.status(model)
