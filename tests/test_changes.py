"""What is done to a first layer after ``enable`` is followed, or one warning says what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

import tract_hub
from tests.oracle import closed_form, conv_rows, relative_error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()


def gradients(model: nn.Module, x: Tensor, run=None) -> dict[str, Tensor]:
    model.zero_grad()
    (model if run is None else run)(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def expected(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """All gradients of a model without TrAct, the closed form put in where it convolves pixels."""
    calls: list[tuple[Tensor, Tensor]] = []
    ordinary = F.conv2d

    def spy(input: Tensor, weight: Tensor, *args) -> Tensor:
        used = weight.clone()  # so that what is made of it can be told from the parameter
        calls.append((input, used))
        return ordinary(input, used, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", spy)
        loss = model(x).square().sum()
    for input, used in calls:
        if input is x and used.requires_grad:
            (raw,) = torch.autograd.grad(loss, used, retain_graph=True)
            corrected = closed_form(raw, conv_rows(x, raw), 0.1)
            used.register_hook(lambda _, corrected=corrected: corrected)
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def widen(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight = nn.Parameter(torch.cat([conv.weight, -conv.weight]))
        conv.bias = nn.Parameter(torch.cat([conv.bias, conv.bias]))
    conv.out_channels = 8


def settle(conv: nn.Module) -> None:
    """Let power iterations settle, so that two forwards have the same weight."""
    with torch.no_grad():
        for _ in range(300):
            conv(torch.zeros(1, 3, 3, 3).double())


def prune_for_good(conv: nn.Module) -> None:
    prune.l1_unstructured(conv, "weight", 0.5)
    prune.remove(conv, "weight")


Change = Callable[[nn.Module], object]
NOTHING: Change = lambda conv: None  # noqa: E731
CHANGES: dict[str, tuple[Change, Change]] = {  # before enable, and after
    "another parameter": (NOTHING, lambda c: setattr(c, "weight", nn.Parameter(c.weight * 2))),
    "other data": (NOTHING, lambda c: setattr(c.weight, "data", c.weight.data * 2)),
    "pruned": (NOTHING, lambda c: prune.l1_unstructured(c, "weight", 0.5)),
    "pruned for good": (NOTHING, prune_for_good),
    "pruning ended": (
        lambda c: prune.l1_unstructured(c, "weight", 0.5),
        lambda c: prune.remove(c, "weight"),
    ),
    "spectral norm": (NOTHING, lambda c: settle(parametrizations.spectral_norm(c))),
    "spectral norm (hook)": (NOTHING, lambda c: settle(spectral_norm(c))),
    "weight norm": (NOTHING, parametrizations.weight_norm),
    "weight norm ended": (
        parametrizations.weight_norm,
        lambda c: parametrize.remove_parametrizations(c, "weight"),
    ),
    "weight norm ended (hook)": (weight_norm, remove_weight_norm),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compiled", [None, "before", "after"])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_weight_is_followed(kind: str, compiled: str | None, x: Tensor) -> None:
    if compiled and "(hook)" in kind:
        pytest.skip("torch compiles no weight that a hook makes")
    before, after = CHANGES[kind]
    model = Net()
    before(model.conv)
    tract_hub.enable(model)
    torch._dynamo.reset()
    if compiled == "before":
        run = torch.compile(model, backend="aot_eager")
        gradients(model, x, run)
    after(model.conv)
    if compiled == "after":
        run = torch.compile(model, backend="aot_eager")
    got = gradients(model, x, run if compiled else None)
    for name, gradient in expected(tract_hub.disable(model), x).items():
        assert relative_error(got[name], gradient) < 1e-9, name


def test_a_widened_layer_is_followed(x: Tensor) -> None:
    model = tract_hub.enable(Net())
    widen(model.conv)
    model.head = nn.Linear(8, 2).double()
    got = gradients(model, x)
    for name, gradient in expected(tract_hub.disable(model), x).items():
        assert relative_error(got[name], gradient) < 1e-11, name


def test_parametrized_after_enable_is_refused_by_global_scope_in_one_sentence(x: Tensor) -> None:
    model = tract_hub.enable(Net(), scope="global")
    parametrizations.weight_norm(model.conv)
    with pytest.raises(tract_hub.TractError, match=r"'conv.weight' is computed from.*'local'"):
        model(x)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_replaced_layer_is_reported_once(scope: str, compiled: bool, x: Tensor) -> None:
    torch._dynamo.reset()
    model = tract_hub.enable(Net(), scope=scope)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    model.conv = nn.Conv2d(3, 4, 3).double()
    with pytest.warns(tract_hub.TractWarning, match=r"'conv.weight' was replaced.*enable\(model\)"):
        gradients(model, x, run)
    gradients(model, x, run)  # a second warning would be an error
    tract_hub.enable(model)
    got = gradients(model, x, run)["conv.weight"]
    assert relative_error(got, expected(tract_hub.disable(model), x)["conv.weight"]) < 1e-11


PEFT = {
    "modules_to_save": {"target_modules": ["head"], "modules_to_save": ["conv"]},
    "LoRA": {"target_modules": ["conv"]},
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("order", ["before", "after", "again"])
@pytest.mark.parametrize("kind", PEFT)
def test_peft_is_followed_or_reported(kind: str, order: str, compiled: bool, x: Tensor) -> None:
    peft = pytest.importorskip("peft")
    torch._dynamo.reset()
    model = Net()
    if order != "after":
        tract_hub.enable(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **PEFT[kind])).double()
    if order != "before":
        tract_hub.enable(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    if (kind, order) == ("LoRA", "before"):
        with pytest.warns(tract_hub.TractWarning, match=r"wrapped.*enable\(model\) again"):
            gradients(model, x, run)
        return
    got = gradients(model, x, run)
    for name, gradient in expected(tract_hub.disable(model), x).items():
        assert relative_error(got[name], gradient) < 1e-11, name


def test_a_wrapped_layer_is_followed(x: Tensor) -> None:
    model = tract_hub.enable(Net())
    model.conv = nn.Sequential(model.conv, nn.Identity())
    got = gradients(model, x)
    for name, gradient in expected(tract_hub.disable(model), x).items():
        assert relative_error(got[name], gradient) < 1e-11, name


class Sensors(nn.Module):
    """A stem for each sensor, chosen when it runs."""

    def __init__(self, sensor: str = "rgb") -> None:
        super().__init__()
        self.stems = nn.ModuleDict({"rgb": nn.Conv2d(3, 4, 3), "heat": nn.Conv2d(3, 4, 3)})
        self.sensor = sensor

    def forward(self, x: Tensor) -> Tensor:
        return self.stems[self.sensor](x)


def test_a_stem_that_is_chosen_as_it_runs_is_named_or_treated(x: Tensor) -> None:
    model = Sensors().double()
    with pytest.warns(tract_hub.TractWarning, match=r"'stems.heat' is like.*stems=\["):
        tract_hub.enable(model)
    tract_hub.enable(model, stems=["stems.rgb", "stems.heat"])
    for model.sensor in ("rgb", "heat", "rgb"):
        name = f"stems.{model.sensor}.weight"
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of the stem that a batch does not use, not a word
            got = gradients(model, x)[name]
        ordinary = tract_hub.disable(Sensors(model.sensor).double())
        ordinary.load_state_dict(model.state_dict())
        assert relative_error(got, expected(ordinary, x)[name]) < 1e-11
