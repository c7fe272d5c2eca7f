"""Weights that a model makes of its parameter in ways of its own: corrected, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import tract_hub
from tests.oracle import closed_form, conv_rows, relative_error


class Written(nn.Module):
    """Makes its kernel of a parameter in a way of its own."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.make(self.weight))


def written_in_place(weight: Tensor) -> Tensor:
    kernel = torch.zeros_like(weight)
    kernel[:, :2] = weight[:, :2]
    kernel[:, 2:] = weight[:, 2:]
    return kernel


@torch.jit.script
def scripted(weight: Tensor) -> Tensor:
    return weight * 2.0 - weight


@pytest.mark.parametrize(
    "make",
    [
        lambda weight: torch.cat(weight.chunk(2)),
        lambda weight: torch.stack(weight.unbind()),
        written_in_place,
        lambda weight: scripted(weight),
    ],
    ids=["chunk", "unbind", "in place", "scripted"],
)
def test_a_weight_in_pieces_or_made_out_of_sight_is_corrected(make) -> None:
    torch.manual_seed(0)
    model, x = Written(make).double(), torch.randn(4, 3, 9, 9).double()
    (raw,) = torch.autograd.grad(model(x).square().sum(), model.weight)
    tract_hub.enable(model)(x).square().sum().backward()
    assert relative_error(model.weight.grad, closed_form(raw, conv_rows(x, raw), 0.1)) < 1e-11


def test_a_cached_parametrization_is_corrected_in_every_forward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 3, bias=False))).double()
    inputs = [torch.randn(4, 3, 9, 9).double() * scale for scale in (1, 3)]

    def gradients(cached: bool) -> list[Tensor]:
        with parametrize.cached() if cached else torch.enable_grad():
            loss = sum(model(x).square().sum() for x in inputs)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    tract_hub.enable(model)
    for got, expected in zip(gradients(True), gradients(False), strict=True):
        assert relative_error(got, expected) < 1e-12


def test_a_kernel_computed_behind_the_first_layer_is_no_first_layer() -> None:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
            self.make = nn.Linear(8, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.conv2d(x, self.weight).tanh()
            return F.conv2d(hidden, self.make(hidden.mean((0, 2, 3))).view(2, 8, 1, 1))

    torch.manual_seed(0)
    model, x = Hyper().double(), torch.randn(4, 3, 9, 9).double()
    (raw,) = torch.autograd.grad(model(x).square().sum(), model.weight)
    tract_hub.enable(model)(x).square().sum().backward()
    assert relative_error(model.weight.grad, closed_form(raw, conv_rows(x, raw), 0.1)) < 1e-11


class OwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        x, weight = ctx.saved_tensors
        return None, torch.nn.grad.conv2d_weight(x, weight.shape, gradient)


class OwnBackwardWithContext(OwnBackward):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    setup_context = torch.autograd.Function.setup_context


@pytest.mark.parametrize("function", [OwnBackward, OwnBackwardWithContext])
def test_a_layer_with_a_backward_of_its_own_is_refused_or_reported(function) -> None:
    class Model(Written):
        own = True

        def forward(self, x: Tensor) -> Tensor:
            return function.apply(x, self.weight) if self.own else super().forward(x)

    model, x = Model(lambda weight: weight), torch.randn(2, 3, 6, 6)
    with pytest.raises(tract_hub.UnsupportedStemError, match="backward of its own"):
        tract_hub.enable(model)
    model.own = False
    tract_hub.enable(model)
    model(x).sum().backward()
    model.own = True
    with pytest.warns(tract_hub.TractWarning, match="'weight' got a gradient that TrAct did not"):
        model(x).sum().backward()
