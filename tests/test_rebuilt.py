"""Tools that rebuild a model: TrAct survives, or one warning names the order that works."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._features_fx import create_feature_extractor as timm_extractor
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor

import tract_hub
from tests.oracle import corrected_gradients, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

Tool = Callable[[nn.Module, Tensor], nn.Module]


class Net(nn.Module):
    """Its stem is a leaf to torch.fx, or is looked into."""

    def __init__(self, leaf: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3) if leaf else timm.layers.StdConv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8, momentum=0.0)  # or each step of QAT is another
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def eager_qat(model: nn.Module, x: Tensor) -> nn.Module:
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.fuse_modules_qat(model, [["conv", "norm"]], inplace=True)
    return quantization.prepare_qat(model, inplace=True)


def fx_qat(model: nn.Module, x: Tensor) -> nn.Module:
    return prepare_qat_fx(model, quantization.get_default_qat_qconfig_mapping("fbgemm"), (x,))


TOOLS: dict[str, Tool] = {
    "torch.fx": lambda model, x: torch.fx.symbolic_trace(model),
    "prepare_qat_fx": fx_qat,
    "prepare_qat_fx of a copy": lambda model, x: fx_qat(copy.deepcopy(model), x),
    "eager QAT": eager_qat,
    "torchvision": lambda model, x: torchvision_extractor(model, ["head"]),
    "timm": lambda model, x: timm_extractor(model, ["head"]),
    "torch.export": lambda model, x: torch.export.export(model, (x,)).module(),
}
SURVIVES = ("torch.fx", "torchvision", "timm")  # where the layer is a leaf, and stays


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    if isinstance(output, dict):
        output = output["head"]
    return (output[0] if isinstance(output, (list, tuple)) else output).square().sum()


def settle(model: nn.Module, x: Tensor) -> None:
    """Let the statistics of quantization see the images, and then rest."""
    with torch.no_grad():
        model(x)
    model.apply(quantization.disable_observer)
    model.apply(torch.ao.nn.intrinsic.qat.freeze_bn_stats)


def gradients(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    model.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):  # a warning comes once, and not in each step
            model.zero_grad()
            loss_of(model, x).backward()
    said = [str(w.message) for w in caught if isinstance(w.message, tract_hub.TractWarning)]
    assert torch.overrides._get_current_function_mode_stack() == []
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, said


def rebuilt(tool: str, model: nn.Module, x: Tensor) -> tuple[nn.Module, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = TOOLS[tool](model, x)
        settle(model, x)
    said = [str(w.message) for w in caught if isinstance(w.message, tract_hub.TractWarning)]
    return model, said


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("tool", TOOLS)
def test_enabled_before_it_survives_or_one_warning_says_enable_after(
    tool: str, leaf: bool, x: Tensor
) -> None:
    if tool == "eager QAT" and not leaf:
        pytest.skip("it knows no other layers")
    model, said = rebuilt(tool, tract_hub.enable(Net(leaf)), x)
    got, more = gradients(model, x)
    if leaf and tool in SURVIVES:
        assert said + more == []
        assert_corrected(got, model, x)
    else:
        (message,) = said + more
        assert "tract_hub.enable" in message
        ordinary, _ = gradients(tract_hub.disable(model), x)
        assert all(torch.equal(got[name], gradient) for name, gradient in ordinary.items())


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("tool", TOOLS)
def test_enabled_after_it_is_exact(tool: str, leaf: bool, x: Tensor) -> None:
    if "qat" in tool.lower() and not leaf:
        pytest.skip("it knows no other layers")
    model, _ = rebuilt(tool, Net(leaf), x)
    tract_hub.enable(model, example_inputs=x, stems=["conv"] if "qat_fx" in tool else None)
    got, said = gradients(model, x)
    assert said == []
    assert_corrected(got, model, x)


def assert_corrected(got: dict[str, Tensor], model: nn.Module, x: Tensor) -> None:
    ordinary = tract_hub.disable(model)
    wanted = corrected_gradients(ordinary, lambda: loss_of(ordinary, x))
    assert (
        relative_error(got["conv.weight"], wanted["conv.weight"]) < 1e-5
    )  # quantization takes float32 only
    plain, _ = gradients(ordinary, x)
    assert relative_error(plain["conv.weight"], wanted["conv.weight"]) > 1e-2
