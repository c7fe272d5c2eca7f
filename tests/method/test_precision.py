"""In what precision the Gram matrix is summed where torch is asked for less than float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tract_hub
from tests.oracle import relative_error
from tract_hub.method.gram.precision import precision_for
from tract_hub.method.operations import read_call


@pytest.fixture(params=["high", "medium", "mkldnn", "all"])
def shortened(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each way to ask; afterwards all is as it was."""
    backends = torch.backends
    before = backends.fp32_precision, backends.mkldnn.matmul.fp32_precision
    cuda = backends.cuda.matmul.fp32_precision
    if request.param == "mkldnn":
        backends.mkldnn.matmul.fp32_precision = "bf16"
    elif request.param == "all":
        backends.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision(request.param)
    yield
    backends.fp32_precision, backends.mkldnn.matmul.fp32_precision = before
    backends.cuda.matmul.fp32_precision = cuda


@pytest.fixture
def call():
    return read_call(torch.conv2d, (torch.randn(2, 3, 16, 16), torch.empty(4, 3, 3, 3)), {})


def test_float32_is_summed_in_float32_by_default(call) -> None:
    assert precision_for(call, 392).products == torch.float32


@pytest.mark.usefixtures("shortened")
def test_what_may_be_shorter_than_float32_is_summed_in_float64(call) -> None:
    assert precision_for(call, 392).products == torch.float64


@pytest.mark.usefixtures("shortened")
def test_a_compiled_layer_is_summed_in_float64_too() -> None:
    torch.manual_seed(0)
    layer, x = tract_hub.enable(torch.nn.Conv2d(3, 4, 3), stems=[""]), torch.randn(2, 3, 16, 16)
    layer(x).square().sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert relative_error(layer.weight.grad, expected) < 1e-6
