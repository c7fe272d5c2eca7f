"""Large symmetric products: by torch's BLAS or by oneDNN, exact for 8-bit pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tract_hub.method.gram import onednn
from tract_hub.method.gram.panels import gram_panels, mirrored
from tract_hub.method.gram.precision import BLOCK_ROWS, Precision

FLOAT32 = Precision(torch.float32, torch.float64, BLOCK_ROWS)
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")


def on_a(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


def gram(rows: Tensor) -> Tensor:
    return mirrored(gram_panels(rows, FLOAT32))


@pytest.mark.parametrize("capability", ["AVX2", pytest.param("AVX512", marks=needs_onednn)])
@pytest.mark.parametrize("shape", [(1, 700, 300), (1, 256, 256), (1, 257, 513), (2, 300, 260)])
def test_sums_of_8_bit_pixels_are_exact(
    monkeypatch: pytest.MonkeyPatch, capability: str, shape: tuple[int, ...]
) -> None:
    on_a(capability, monkeypatch)
    torch.manual_seed(0)
    rows = torch.randint(256, shape).float()
    assert torch.equal(gram(rows), rows.double().mT @ rows.double())


@needs_onednn
def test_onednn_is_asked_only_for_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(1, 300, 256)
    on_a("AVX2", monkeypatch)
    assert not onednn.suits(rows)
    on_a("AVX512", monkeypatch)
    assert onednn.suits(rows)
    assert not onednn.suits(rows.double())
    assert not onednn.suits(rows.expand(2, -1, -1))
    assert not onednn.suits(rows.to("meta"))
    seen = []
    torch.func.vmap(lambda each: seen.append(onednn.suits(each)) or each)(rows.unsqueeze(0))
    assert seen == [False]
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.suits(rows)


@needs_onednn
def test_the_error_of_onednn_is_that_of_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows = torch.rand(1, 2048, 256)
    exact = rows.double().mT @ rows.double()
    errors = []
    for capability in ("AVX2", "AVX512"):
        on_a(capability, monkeypatch)
        errors.append(float((gram(rows) - exact).norm() / exact.norm()))
    assert errors[1] < 1.5 * errors[0]
