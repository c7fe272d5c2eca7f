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
from tests.oracle import corrected_gradients, relative_error


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


def assert_followed(got: dict[str, Tensor], model: nn.Module, x: Tensor) -> None:
    ordinary = tract_hub.disable(model)
    wanted = corrected_gradients(ordinary, lambda: ordinary(x).square().sum())
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert relative_error(got[name], gradient) < 1e-9, name  # as power iterations settle


def widen(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight = nn.Parameter(torch.cat([conv.weight, -conv.weight]))
        conv.bias = nn.Parameter(torch.cat([conv.bias, conv.bias]))
    conv.out_channels = 8


def settle(conv: nn.Module) -> None:
    """Let power iterations settle, so that two forwards have the same weight."""
    with torch.no_grad():
        for _ in range(100):
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
    assert_followed(got, model, x)


def test_a_widened_layer_is_followed(x: Tensor) -> None:
    model = tract_hub.enable(Net())
    widen(model.conv)
    model.head = nn.Linear(8, 2).double()
    got = gradients(model, x)
    assert_followed(got, model, x)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_weight_that_torch_swaps_for_another_is_followed(scope: str, x: Tensor) -> None:
    """As ``.to`` and ``load_state_dict`` do where weights are DTensors or torchao's."""
    model = tract_hub.enable(Net(), scope=scope)
    for _ in range(2):
        weight = model.conv.weight
        torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 2))
        model.zero_grad()
        model(x).square().sum().backward()
        tract_hub.finish(model)
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_followed(got, model, x)


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
    # torch 2.11 leaves the graph to look into a module.
    whole = not torch.__version__.startswith("2.11")
    run = torch.compile(model, backend="aot_eager", fullgraph=whole) if compiled else model
    model.conv = nn.Conv2d(3, 4, 3).double()
    with pytest.warns(tract_hub.TractWarning, match=r"'conv.weight' was replaced.*enable\(model\)"):
        gradients(model, x, run)
    gradients(model, x, run)  # a second warning would be an error
    tract_hub.enable(model)
    assert_followed(gradients(model, x, run), model, x)


PEFT = {
    "modules_to_save": {"target_modules": ["head"], "modules_to_save": ["conv"]},
    "LoRA": {"target_modules": ["conv"]},
}


def test_peft_may_save_a_module_above_the_layer(x: Tensor) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("embed", nn.Sequential(Net().conv, nn.ReLU()))
    model.add_module("head", nn.Conv2d(4, 2, 3).double())
    settings = peft.LoraConfig(r=2, target_modules=["head"], modules_to_save=["embed"])
    model = peft.get_peft_model(tract_hub.enable(model), settings).double()
    assert_followed(gradients(model, x), model, x)


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
    assert_followed(got, model, x)


def test_a_wrapped_layer_is_followed(x: Tensor) -> None:
    model = tract_hub.enable(Net())
    model.conv = nn.Sequential(model.conv, nn.Identity())
    got = gradients(model, x)
    assert_followed(got, model, x)


class Sensors(nn.Module):
    """A stem for each sensor, chosen when it runs."""

    def __init__(self, sensor: str = "rgb") -> None:
        super().__init__()
        self.stems = nn.ModuleDict({"rgb": nn.Conv2d(3, 4, 3), "heat": nn.Conv2d(3, 4, 3)})
        self.sensor = sensor

    def forward(self, x: Tensor) -> Tensor:
        return self.stems[self.sensor](x)


def test_hidden_layers_of_the_first_one_s_shape_are_not_spoken_of() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tract_hub.enable(Stack())
    assert [stem.weight_name for stem in tract_hub.status(model)] == ["layers.0.weight"]


def test_a_stem_that_is_chosen_as_it_runs_is_named_or_treated(x: Tensor) -> None:
    model = Sensors().double()
    with pytest.warns(tract_hub.TractWarning, match=r"'stems.heat' is alike.*stems=\["):
        tract_hub.enable(model)
    tract_hub.enable(model, stems=["stems.rgb", "stems.heat"])
    for model.sensor in ("rgb", "heat", "rgb"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of the stem that a batch does not use, not a word
            got = gradients(model, x)
        ordinary = Sensors(model.sensor).double()
        ordinary.load_state_dict(model.state_dict())
        assert_followed(got, ordinary, x)
