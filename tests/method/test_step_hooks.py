"""The hooks of ``scope="global"`` on optimizers' steps: closures, and steps of other optimizers."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    return model.double()


def test_a_closure_may_run_the_last_of_several_backwards() -> None:
    """As Lightning accumulates: the step begins with the gradient of all batches but the last."""
    x, y = torch.randn(16, 1, 8, 8).double(), torch.arange(16) % 10

    def backward(model: nn.Module, part: slice) -> Tensor:
        loss = nn.functional.cross_entropy(model(x[part]), y[part])
        loss.backward()
        return loss

    model = tract_hub.enable(build(), scope="global")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, slice(0, 8))

        def closure() -> Tensor:
            loss = backward(model, slice(8, 16))
            tract_hub.finish(model)
            return loss

        expected = build()
        expected.load_state_dict(model.state_dict())
        backward(expected, slice(0, 8))
        backward(expected, slice(8, 16))
        optimizer.step(closure)
        wanted = closed_form(expected[0].weight.grad, layer_rows(expected[0], x), 0.1)
        assert relative_error(model[0].weight.grad, wanted) < 1e-11


def test_a_step_of_others_goes_on_when_the_model_is_gone() -> None:
    model = tract_hub.enable(build(), scope="global")
    model(torch.randn(2, 1, 8, 8).double()).sum().backward()
    del model
    seen: list[int] = []
    other = torch.optim.SGD(build().parameters(), 0.1)
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(1))
    gc.collect()
    other.step()
    handle.remove()
    assert seen == [1]
