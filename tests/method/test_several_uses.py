"""Several uses of a weight in one forward share one Gram matrix, however the model makes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tract_hub
from tests.oracle import closed_form, conv_rows, relative_error


class CallsItself(nn.Module):
    """Goes through a list of images, or on to a smaller one, by calling itself."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.functional = functional

    def apply_stem(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.stem.weight) if self.functional else self.stem(x)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        if isinstance(x, list):
            return sum(self(image) for image in x)
        first = self.apply_stem(x).square().mean()
        return first + (3 * self(x[..., ::2, ::2]) if x.shape[-1] > 8 else 0) + self.last(x)

    def last(self, x: Tensor) -> Tensor:
        return self.apply_stem(x.flip(-1) * 2).mean()


@pytest.mark.parametrize("functional", [False, True])
def test_a_model_that_calls_itself_is_one_forward(functional: bool) -> None:
    torch.manual_seed(0)
    model = CallsItself(functional).double()
    images = [torch.randn(4, 3, side, side).double() for side in (12, 7)]
    (raw,) = torch.autograd.grad(model(images), model.stem.weight)
    seen = [images[0], images[0][..., ::2, ::2], images[1]]
    rows = [conv_rows(image * scale, raw)[0] for image in seen for scale in (1, 2)]
    rows[1::2] = [conv_rows(image.flip(-1) * 2, raw)[0] for image in seen]
    tract_hub.enable(model, example_inputs=(images[0],))
    model(images).backward()
    expected = closed_form(raw, [torch.cat(rows)], 0.1)
    assert relative_error(model.stem.weight.grad, expected) < 1e-11
    assert torch.overrides._get_current_function_mode_stack() == []


class TwiceRecomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.reentrant = reentrant

    def both(self, x: Tensor) -> Tensor:
        return self.stem(x).mean() + self.stem(x[..., ::2, ::2] * 3).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.both, x, use_reentrant=self.reentrant) if self.training else x


def test_a_checkpoint_that_would_take_uses_apart_is_refused() -> None:
    torch.manual_seed(0)
    model = TwiceRecomputed(reentrant=False).double()
    x = torch.randn(4, 3, 9, 9).double().requires_grad_()
    (raw,) = torch.autograd.grad(model.both(x), model.stem.weight)
    rows = [torch.cat([conv_rows(x, raw)[0], conv_rows(x[..., ::2, ::2] * 3, raw)[0]])]
    tract_hub.enable(model, stems=["stem"])(x).backward()
    assert relative_error(model.stem.weight.grad, closed_form(raw, rows, 0.1)) < 1e-11
    model.reentrant = True
    with pytest.raises(tract_hub.TractError, match="use_reentrant=False"):
        model(x)
    checkpoint(model.both, x, use_reentrant=True)  # no forward of the model: each use for itself
