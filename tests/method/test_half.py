"""The Gram matrix of half-precision rows, as a GPU computes it, checked where there is none too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle import conv_rows, relative_error
from tract_hub.method.gram import half, strips
from tract_hub.method.gram.half import half_gram
from tract_hub.method.gram.precision import Precision
from tract_hub.method.operations import LinearCall, read_call


def precision(dtype: torch.dtype, block_rows: int = 4096) -> Precision:
    return Precision(dtype, torch.float64, block_rows, "sometimes")


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[LinearCall, dict[str, object]]:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups, kernel, size = draw(st.integers(1, 2)), pair(1, 7), pair(4, 20)
    assume(all(k <= s for k, s in zip(kernel, size, strict=True)))
    geometry = {"stride": pair(1, 4), "padding": pair(0, 3), "groups": groups}
    torch.manual_seed(draw(st.integers(0, 1000)))
    channels = groups * draw(st.integers(1, 4))
    x = torch.randn(draw(st.integers(1, 5)), channels, *size)
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    x = x.to(draw(st.sampled_from([torch.bfloat16, torch.float16])))
    weight = torch.empty(2 * groups, channels // groups, *kernel)
    call = read_call(torch.conv2d, (x, weight), geometry)
    assert call is not None
    return call, geometry


@settings(max_examples=200, deadline=None)
@given(
    convolutions(),
    st.sampled_from([200, 2000, 2**20]),
    st.sampled_from([1, 40, 128, 400]),
    st.sampled_from([7, 50, 4096]),
)
def test_it_is_that_of_the_rows_for_any_geometry(
    case: tuple[LinearCall, dict], chunk: int, wide: int, block_rows: int
) -> None:
    call, geometry = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half, "CHUNK_ELEMENTS", chunk)
        patch.setattr(strips, "WIDE", wide)
        got, _ = half_gram(call, precision(call.input.dtype, block_rows))
    for gram, X in zip(
        got, conv_rows(call.input.double(), call.weight.double(), **geometry), strict=True
    ):
        assert relative_error(gram, X.T @ X) < 5e-6  # a float32 sum of some thousand rows


@pytest.mark.parametrize("kernel, stride, strips_", [(7, 2, True), (3, 1, True), (4, 4, False)])
def test_windows_that_overlap_are_taken_from_strips(
    kernel: int, stride: int, strips_: bool
) -> None:
    x, weight = torch.empty(2, 3, 64, 64), torch.empty(8, 3, kernel, kernel)
    call = read_call(torch.conv2d, (x, weight, None, stride), {})
    assert strips.suits_strips(call) is strips_


def test_products_of_many_channels_would_take_too_much_memory_as_strips() -> None:
    x, weight = torch.empty(2, 64, 224, 224), torch.empty(8, 64, 7, 7)
    assert not strips.suits_strips(read_call(torch.conv2d, (x, weight, None, 2, 3), {}))


@pytest.mark.parametrize("shape", [(9,), (5, 9), (3, 70, 9)])
def test_it_is_that_of_the_rows_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    x: Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    got, _ = half_gram(LinearCall("linear", x, torch.empty(4, 9)), precision(x.dtype, 16))
    X = x.double().reshape(-1, 9)
    assert relative_error(got[0], X.T @ X) < 1e-6
