"""The estimate of the Gram matrix from a share of the images: off unless it is asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error

CONV, LINEAR = nn.Conv2d(3, 4, 3, stride=2, padding=1).double(), nn.Linear(6, 4).double()
IMAGES, PATCHES = torch.Size((9, 3, 12, 12)), torch.Size((9, 5, 6))


def gradient(
    layer: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    layer.zero_grad()
    output = (forward or layer)(x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=x.dtype)
    (output * weights.view(output.shape)).sum().backward()
    return layer.weight.grad.clone()


@pytest.fixture(params=[(CONV, IMAGES), (LINEAR, PATCHES)], ids=["conv2d", "linear"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    layer, shape = request.param
    torch.manual_seed(0)
    yield layer, torch.randn(shape, dtype=torch.double)
    tract_hub.disable(layer)


@pytest.mark.parametrize(
    ("share", "step"), [(1, 1), (0.7, 1), (0.5, 2), (0.4, 2), (1 / 3, 3), (0.25, 4), (1e-6, 9)]
)
def test_every_so_many_images_make_the_gram_matrix(case, share: float, step: int) -> None:
    layer, x = case
    ordinary = gradient(layer, x)
    state = torch.get_rng_state()
    found = gradient(tract_hub.enable(layer, stems=[""], rows=share), x)
    expected = closed_form(ordinary, layer_rows(layer, x[::step]), 0.1)
    assert relative_error(found, expected) < 1e-12
    assert torch.equal(torch.get_rng_state(), state)
    assert tract_hub.status(layer)[0].rows == share


def test_it_compiles_to_the_same_gradient(case) -> None:
    layer, x = case
    expected = gradient(tract_hub.enable(layer, stems=[""], rows=0.25), x)
    tract_hub.disable(layer)
    # In a model of its own: torch 2.11 takes one pre-hook for another where a module has two and
    # the later one was put first, whoever put them there.
    model = tract_hub.enable(nn.Sequential(layer), stems=["0"], rows=0.25)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(gradient(layer, x, compiled), expected) < 1e-12


def test_one_image_without_a_batch_stays_whole() -> None:
    x = torch.randn(IMAGES[1:], dtype=torch.double)
    exact = gradient(tract_hub.enable(CONV, stems=[""]), x)
    with pytest.warns(tract_hub.TractWarning, match=r"rows changed from 1 to 0\.25"):
        tract_hub.enable(CONV, stems=[""], rows=0.25)
    assert torch.equal(gradient(CONV, x), exact)
    tract_hub.disable(CONV)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), float("inf"), True, "half", None])
def test_a_share_that_is_none_is_refused(share: object) -> None:
    with pytest.raises(ValueError, match="rows must be a number above 0 and at most 1"):
        tract_hub.enable(nn.Conv2d(3, 4, 3), stems=[""], rows=share)


def test_an_estimate_over_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="pass scope='rank'"):
        tract_hub.enable(nn.Conv2d(3, 4, 3), stems=[""], scope="global", rows=0.5)
