"""Accelerate: enable before or after whatever else is done to a model, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module
from accelerate.state import AcceleratorState, GradientState
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error


class Net(nn.Module):
    """A stem, a block and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((-2, -1)))


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def expected(*batches: Tensor, together: bool = False) -> dict[str, Tensor]:
    """Mean gradients of a fresh model over batches, that of the stem by the closed form."""
    total: dict[str, Tensor] = {}
    for x in batches:
        model = Net()
        (model(x).square().sum() / len(batches)).backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            if name == "stem.weight":
                rows = layer_rows(model.stem, torch.cat(batches) if together else x)
                gradient = closed_form(gradient, rows, 0.1)
            total[name] = total.get(name, 0) + gradient
    return total


class Training:
    """A model and what is done to it, one thing after the other."""

    def __init__(self) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.model: nn.Module = Net()
        self.parameters = dict(self.model.named_parameters())

    def make_optimizer(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)

    def prepare(self) -> None:
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def hook(self) -> None:
        add_hook_to_module(self.model, SequentialHook(ModelHook(), ModelHook()))

    def compile(self) -> None:
        self.model = torch.compile(self.model, backend="aot_eager")

    def checkpoint(self) -> None:
        apply_activation_checkpointing(self.model, check_fn=lambda m: isinstance(m, nn.Conv2d))

    def copy(self) -> None:
        self.ema = ModelEmaV3(self.model, decay=0.5)

    def enable(self) -> None:
        tract_hub.enable(self.model, lam=0.1)


ORDERS = [
    ["checkpoint", "make_optimizer", "copy", "compile", "prepare"],
    ["hook", "make_optimizer", "prepare", "copy"],
]


@pytest.mark.parametrize(
    "order",
    [[*o[:at], "enable", *o[at:]] for o in ORDERS for at in range(len(o) + 1)],
    ids=" ".join,
)
def test_every_order_trains_with_the_closed_form(order: list[str], x: Tensor) -> None:
    training = Training()
    for step in order:
        getattr(training, step)()
    before = {name: p.detach().clone() for name, p in training.parameters.items()}
    for _ in range(2):  # a checkpoint or a graph could act on the second forward only
        training.optimizer.zero_grad()
        training.accelerator.backward(training.model(x).square().sum())
    training.optimizer.step()
    for name, gradient in expected(x).items():
        assert relative_error(training.parameters[name].grad, gradient) < 1e-5, name
        moved = training.parameters[name].detach() - before[name]
        assert relative_error(moved, -0.1 * gradient) < 1e-4, name
    training.ema.update(training.accelerator.unwrap_model(training.model))
    names = [name for name, _ in training.ema.module.named_parameters() if "stem" in name]
    mean = (before["stem.weight"] + training.parameters["stem.weight"].detach()) / 2
    (stem,) = [training.ema.module.get_parameter(n) for n in names if n.endswith("weight")]
    assert relative_error(stem.detach(), mean) < 1e-5


@pytest.mark.parametrize("scope", ["local", "global"])
def test_accumulated_batches_have_a_matrix_each_or_one_together(scope: str, x: Tensor) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tract_hub.enable(Net(), scope=scope)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    norms = []
    for part in (x, 3 * x):
        with accelerator.accumulate(model):
            accelerator.backward(model(part).square().sum())
            if accelerator.sync_gradients:
                tract_hub.finish(model)
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1e6)))
            optimizer.step()
    wanted = expected(x, 3 * x, together=scope == "global")
    for name, gradient in wanted.items():
        assert relative_error(model.get_parameter(name).grad, gradient) < 1e-5, name
    total = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert norms == pytest.approx([float(total)], rel=1e-5)
