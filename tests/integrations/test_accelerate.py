"""Accelerate: enable before or after whatever else is done to a model, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.utils import parametrize
from tract_hub.integrations.trainer.measurement import Measurement

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
    torch._dynamo.reset()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def expected(x: Tensor, lam: float = 0.1) -> dict[str, Tensor]:
    """All gradients of a fresh model, that of the stem by the closed form."""
    model = Net()
    model(x).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    rows = layer_rows(model.stem, x)
    return gradients | {"stem.weight": closed_form(gradients["stem.weight"], rows, lam)}


class Training:
    """A model and what is done to it, one thing after the other."""

    def __init__(self) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.model: nn.Module = Net()
        self.parameters = dict(self.model.named_parameters())
        self.optimizer: torch.optim.Optimizer | None = None
        self.ema: ModelEmaV3 | None = None

    def make_optimizer(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)

    def prepare(self) -> None:
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

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
    ["make_optimizer", "prepare", "compile", "copy"],
    ["copy", "make_optimizer", "prepare", "checkpoint"],
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
        for name, gradient in expected(x).items():
            assert relative_error(training.parameters[name].grad, gradient) < 1e-5, name
    training.optimizer.step()
    for name, gradient in expected(x).items():
        assert (
            relative_error(training.parameters[name].detach(), before[name] - 0.1 * gradient) < 1e-5
        )
    training.ema.update(training.accelerator.unwrap_model(training.model))
    ema = dict(training.ema.module.named_parameters())
    stem = next(p for name, p in ema.items() if "stem" in name and name.endswith("weight"))
    mean = (before["stem.weight"] + training.parameters["stem.weight"]) / 2
    assert relative_error(stem.detach(), mean.detach()) < 1e-5


@pytest.mark.parametrize("dynamo", ["no", "aot_eager"])
@pytest.mark.parametrize("first", [True, False])
def test_a_model_that_accelerate_compiles_is_treated(first: bool, dynamo: str, x: Tensor) -> None:
    accelerator = Accelerator(cpu=True, dynamo_backend=dynamo)
    model = Net()
    parameters = dict(model.named_parameters())
    if first:
        tract_hub.enable(model)
    prepared = accelerator.prepare(model)
    if not first:
        tract_hub.enable(prepared)
    accelerator.backward(prepared(x).square().sum())
    for name, gradient in expected(x).items():
        assert relative_error(parameters[name].grad, gradient) < 1e-5, name


def test_each_micro_batch_has_its_own_gram(x: Tensor) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tract_hub.enable(Net())
    model = accelerator.prepare(model)
    total: dict[str, Tensor] = {}
    for part in (x, 3 * x):
        with accelerator.accumulate(model):
            accelerator.backward(model(part).square().sum())
        for name, gradient in expected(part).items():
            total[name] = total.get(name, 0) + gradient / 2
    for name, gradient in total.items():
        assert relative_error(model.get_parameter(name).grad, gradient) < 1e-5, name


class Patched:
    """What an instance-level ``forward`` can be made of."""

    @staticmethod
    def by_accelerate(layer: nn.Module) -> None:
        add_hook_to_module(layer, SequentialHook(ModelHook(), ModelHook()))

    @staticmethod
    def by_hand(layer: nn.Module) -> None:
        original = layer.forward
        layer.forward = lambda *args, **kwargs: original(*args, **kwargs)

    @staticmethod
    def by_another_call(layer: nn.Module) -> None:
        layer.forward = lambda x: nn.functional.conv2d(x, layer.weight, layer.bias, 2, 1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("patch", "where"),
    [
        ("by_accelerate", "stem"),
        ("by_accelerate", ""),
        ("by_hand", "stem"),
        ("by_hand", ""),
        ("by_another_call", "stem"),
    ],
)
def test_a_forward_of_the_instance_hides_nothing(
    patch: str, where: str, first: bool, x: Tensor
) -> None:
    model = Net()
    if first:
        tract_hub.enable(model)
    getattr(Patched, patch)(model.get_submodule(where))
    if not first:
        tract_hub.enable(model)
    accelerator = Accelerator(cpu=True)
    accelerator.backward(accelerator.prepare(model)(x).square().sum())
    for name, gradient in expected(x).items():
        assert relative_error(model.get_parameter(name).grad, gradient) < 1e-5, name


def test_a_forward_that_leaves_the_stem_out_is_reported(x: Tensor) -> None:
    model = tract_hub.enable(Net())
    model.stem.forward = lambda x: torch.zeros(4, 6, 8, 8)
    with pytest.warns(tract_hub.TractWarning, match=r"'stem\.weight'"):
        model(x)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("first", [True, False])
def test_a_parametrization_is_seen_or_reported(first: bool, x: Tensor) -> None:
    model = Net()
    if first:
        tract_hub.enable(model)
    parametrize.register_parametrization(model.stem, "weight", Halved())
    if first:
        with pytest.warns(tract_hub.TractWarning, match=r"'stem\.weight'"):
            model(x)
        tract_hub.enable(tract_hub.disable(model))
    else:
        tract_hub.enable(model)
    accelerator = Accelerator(cpu=True)
    accelerator.backward(accelerator.prepare(model)(x).square().sum())
    got = model.stem.parametrizations.weight.original.grad.clone()
    model.zero_grad()
    tract_hub.disable(model)(x).square().sum().backward()
    ordinary = model.stem.parametrizations.weight.original.grad
    rows = layer_rows(Net().stem, x)
    assert relative_error(got, closed_form(ordinary, rows, 0.1)) < 1e-5


def steps(accelerator: Accelerator, model: nn.Module, optimizer: object, times: int) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 16, 16)  # of the random state that is saved
        accelerator.backward(model(x).square().mean())
        optimizer.step()


def prepared(treat: Callable[[nn.Module], nn.Module]) -> tuple:
    model = treat(Net())
    accelerator = Accelerator(cpu=True)
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 0.1))


def ordinary(model: nn.Module) -> nn.Module:
    return model


@pytest.mark.parametrize("saved", [tract_hub.enable, ordinary])
@pytest.mark.parametrize("loaded", [tract_hub.enable, ordinary])
def test_a_saved_state_is_loaded_with_and_without(
    saved: Callable, loaded: Callable, tmp_path: Path
) -> None:
    accelerator, model, optimizer = prepared(saved)
    steps(accelerator, model, optimizer, 2)
    accelerator.save_state(str(tmp_path))
    steps(accelerator, model, optimizer, 2)
    torch.manual_seed(9)
    other, again, its_optimizer = prepared(loaded)
    other.load_state(str(tmp_path))
    steps(other, again, its_optimizer, 2)
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)]
    assert all(same) if saved is loaded else not any(same)


def test_what_is_measured_is_not_scaled(x: Tensor) -> None:
    model = tract_hub.enable(Net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    values = []
    Accelerator(cpu=True)
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**8)):
        measurement = Measurement(model)
        loss = model(x).square().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        measurement.stop(AcceleratedOptimizer(optimizer, scaler=scaler))
        values.append(measurement.values())
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert values[0]["tract/stem/damping"] == 0.1
