"""Forwards that somebody wraps after ``enable``, and models whose tensors have no values."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def in_a_closure(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return forward(*args, **kwargs)

    return wrapper


WRAPPERS = {
    "closure": in_a_closure,
    "functools.wraps": lambda forward: functools.wraps(forward)(in_a_closure(forward)),
    "partial": functools.partial,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_first_layer_is_enabled_anew_and_disabled(wrap) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    model = tract_hub.enable(Net().double())
    model.conv.forward = wrap(model.conv.forward)
    assert [stem.lam for stem in tract_hub.status(model)] == [0.1]
    tract_hub.enable(model, 0.3)
    assert [stem.lam for stem in tract_hub.status(model)] == [0.3]
    model(x).square().sum().backward()
    corrected = model.conv.weight.grad.clone()
    tract_hub.disable(model).zero_grad()
    assert not tract_hub.status(model)
    model(x).square().sum().backward()
    expected = closed_form(model.conv.weight.grad, layer_rows(model.conv, x), 0.3)
    assert relative_error(corrected, expected) <= 1e-11


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("fake", [False, True])
def test_a_model_without_values_has_gradients_without_values(scope: str, fake: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.device("meta"):
        model = tract_hub.enable(Net(), scope=scope)
        model(torch.empty(2, 3, 8, 8)).sum().backward()
    tract_hub.finish(model)
    assert model.conv.weight.grad.shape == model.conv.weight.shape
