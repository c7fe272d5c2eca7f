"""Any Conv or Linear layer: its gradient is the closed form, all else is the ordinary layer's."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}  # the contract's

pytestmark = pytest.mark.filterwarnings("ignore:the input of .* has a mean square")


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output, parameter gradients and input gradient of a loss that weighs every output."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    output = layer(x)
    weights = torch.linspace(-1, 1, max(output.numel(), 1), dtype=x.dtype)[: output.numel()]
    (output * weights.view(output.shape)).sum().backward()
    return output, {n: p.grad.clone() for n, p in layer.named_parameters()}, x.grad


def check(layer: nn.Module, x: Tensor, lam: float = 0.1, tolerance: float | None = None) -> None:
    ordinary = copy.deepcopy(layer)
    tract_hub.enable(layer, lam=lam, stems=[""])
    output, grads, x_grad = gradients(layer, x)
    plain_output, plain_grads, plain_x_grad = gradients(ordinary, x)
    assert torch.equal(output, plain_output)
    assert torch.equal(x_grad, plain_x_grad)
    for name in grads:
        if name != "weight":
            assert torch.equal(grads[name], plain_grads[name])
    # The oracle starts from a float64 gradient, so what the closed form makes of the ordinary
    # gradient's own rounding counts too: with few rows, it is magnified by up to 1 / λ.
    _, exact_grads, _ = gradients(copy.deepcopy(ordinary).double(), x.double())
    X = layer_rows(ordinary, x)
    expected = closed_form(exact_grads["weight"], X, lam)
    own = relative_error(closed_form(plain_grads["weight"], X, lam), expected)
    error = relative_error(grads["weight"], expected)
    assert error <= (tolerance or TOLERANCE[x.dtype]) + own, (error, own)


def correction_error(layer: nn.Module, x: Tensor, lam: float) -> float:
    """Relative error against the closed form of the ordinary gradient that the layer had."""
    layer = tract_hub.disable(layer)
    ordinary = gradients(layer, x)[1]["weight"]
    corrected = gradients(tract_hub.enable(layer, lam=lam, stems=[""]), x)[1]["weight"]
    return relative_error(corrected, closed_form(ordinary, layer_rows(layer, x), lam))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dimensions = draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    groups = draw(st.integers(1, 3))
    kernel, stride, dilation = sizes(1, 4), sizes(1, 3), sizes(1, 2)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["valid", "same", "numbers"]))
    if padding == "same":
        stride = (1,) * dimensions
    space = sizes(4, 9)
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    assume(all(e <= s for e, s in zip(extent, space, strict=True)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = getattr(nn, f"Conv{dimensions}d")(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=sizes(0, 2) if padding == "numbers" else padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=draw(st.booleans()),
    )
    x = torch.randn(draw(st.integers(1, 4)), layer.in_channels, *space)
    if draw(st.booleans()):
        x = x[0]
    elif dimensions > 1 and draw(st.booleans()):
        formats = {2: torch.channels_last, 3: torch.channels_last_3d}
        x = x.to(memory_format=formats[dimensions])
    return layer, x


@settings(max_examples=150, deadline=None)
@given(convolutions(), st.sampled_from([1e-4, 1e-2, 0.1, 10.0]))
def test_any_convolution_gets_the_closed_form_in_float64(
    case: tuple[nn.Module, Tensor], lam: float
) -> None:
    layer, x = case
    # A λ of 1e-4 on a singular Gram matrix magnifies the rounding of the ordinary gradient.
    check(layer.double(), x.double(), lam, tolerance=1e-11 / min(lam, 0.1) * 0.1)


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_any_convolution_gets_the_closed_form_in_float32(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    check(layer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 2, 2, 8), (40, 8)])
def test_a_linear_layer_gets_the_closed_form_for_any_leading_shape(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    check(nn.Linear(8, 4).to(dtype), torch.randn(shape, dtype=dtype))


FEW_ROWS = {
    "one vector": (lambda: nn.Linear(8, 4), (8,)),
    "vectors": (lambda: nn.Linear(8, 4), (2, 3, 8)),
    "one image": (lambda: nn.Conv2d(3, 4, 4, 4), (3, 8, 12)),
    "images in groups": (lambda: nn.Conv2d(4, 6, 4, 4, groups=2), (2, 4, 8, 12)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FEW_ROWS)
def test_an_input_without_gradient_of_few_rows_gives_the_closed_form(name: str, dtype) -> None:
    torch.manual_seed(0)
    build, shape = FEW_ROWS[name]
    layer, x = build().to(dtype), torch.randn(shape, dtype=dtype)
    layer(x).square().sum().backward()
    expected = closed_form(layer.weight.grad, layer_rows(layer, x), 0.1)
    tract_hub.enable(layer, stems=[""]).zero_grad()
    layer(x).square().sum().backward()
    assert relative_error(layer.weight.grad, expected) <= TOLERANCE[dtype]


@pytest.fixture
def slow_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve as on a GPU that is slow at float64."""
    for module in ("correct", "gram"):  # the first imports the second, which must be whole
        monkeypatch.setattr(f"tract_hub.method.{module}.has_fast_float64", lambda device: False)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 2), (16, 16)])
def test_photographs_are_exact_where_float64_is_slow(
    kernel: int, stride: int, photographs: Tensor, slow_float64: None
) -> None:
    torch.manual_seed(0)
    x = (photographs - photographs.mean()) / photographs.std()
    assert correction_error(nn.Conv2d(3, 8, kernel, stride), x, 0.1) <= TOLERANCE[x.dtype]


def test_few_rows_of_low_rank_have_a_gradient_where_float64_is_slow(slow_float64: None) -> None:
    torch.manual_seed(0)
    x = 100 * torch.randn(64, 4) @ torch.randn(4, 3072)
    layer = tract_hub.enable(nn.Linear(3072, 4), 1e-4, stems=[""])
    layer(x).square().sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_a_non_contiguous_input_is_read_as_it_is() -> None:
    torch.manual_seed(0)
    check(nn.Linear(6, 4).double(), torch.randn(6, 10, dtype=torch.double).T)
    check(nn.Conv2d(3, 4, 3).double(), torch.randn(2, 9, 9, 3).double().permute(0, 3, 1, 2))


@pytest.mark.parametrize("lam", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize(
    "fill",
    {
        "constant": lambda x: torch.full_like(x, 0.7),
        "zero": torch.zeros_like,
        "one-hot": lambda x: (torch.arange(x.numel()) == 5).view(x.shape).to(x),
        "bytes": lambda x: (x.abs() * 255).round().clamp(max=255),
        "huge": lambda x: x * 1e4,
    }.values(),
    ids=["constant", "zero", "one-hot", "bytes", "huge"],
)
@pytest.mark.parametrize("kernel", [3, 8])
def test_extreme_inputs_are_exact(fill, lam: float, kernel: int) -> None:
    torch.manual_seed(0)
    x = fill(torch.randn(4, 3, 32, 32, dtype=torch.double))
    check(nn.Conv2d(3, 4, kernel).double(), x, lam, tolerance=1e-7)
    assert correction_error(nn.Conv2d(3, 4, kernel, stride=2), x.float(), lam) <= 1e-5


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 2, 1), (7, 2, 3), (14, 14, 0), (16, 16, 0)]
)
def test_photographs_are_exact_in_float32(
    photographs: Tensor, kernel: int, stride: int, padding: int
) -> None:
    """Their Gram matrix is badly conditioned, as neighbouring pixels are alike."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, kernel, stride, padding)
    standardised = (photographs - photographs.mean()) / photographs.std()
    for images, lam in ((standardised, 0.1), (standardised, 1e-4), (photographs, 0.1)):
        assert correction_error(layer, images, lam) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("kernel", [16, 32])
def test_photographs_of_fewer_rows_than_features_are_exact_in_float32(
    photographs: Tensor, kernel: int
) -> None:
    torch.manual_seed(0)
    images = (photographs - photographs.mean()) / photographs.std()
    images = images[:2] if kernel == 16 else images
    layer = nn.Conv2d(3, 8, kernel, kernel)
    exact = copy.deepcopy(layer).double()
    tract_hub.enable(layer, stems=[""])(images).square().sum().backward()
    exact(images.double()).square().sum().backward()
    expected = closed_form(exact.weight.grad, layer_rows(exact, images.double()), 0.1)
    assert relative_error(layer.weight.grad, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("lam", [1e-4, 0.1, 10.0])
def test_a_smooth_ramp_is_exact_in_float32(lam: float) -> None:
    """A float32 Gram matrix of it has eigenvalues far below zero."""
    ramp = torch.linspace(-2, 2, 224).expand(16, 3, 224, 224) * 100
    assert correction_error(nn.Conv2d(3, 4, 16, stride=16), ramp, lam) <= 1e-3 * min(1, 0.1 / lam)


def test_one_row_is_enough() -> None:
    torch.manual_seed(0)
    check(nn.Linear(20, 4).double(), torch.randn(1, 20).double())
    check(nn.Conv2d(3, 4, 5).double(), torch.randn(1, 3, 5, 5).double())


def test_an_empty_batch_gives_a_zero_gradient() -> None:
    for layer, x in (
        (nn.Conv2d(3, 4, 3), torch.empty(0, 3, 8, 8)),
        (nn.Linear(6, 4), torch.empty(0, 6)),
    ):
        tract_hub.enable(layer, stems=[""])
        assert torch.equal(gradients(layer, x)[1]["weight"], torch.zeros_like(layer.weight))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_input_gives_a_non_finite_gradient(bad: float) -> None:
    for layer, x in (
        (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)),
        (nn.Linear(6, 4), torch.randn(9, 6)),
    ):
        x.view(-1)[3] = bad
        tract_hub.enable(layer, stems=[""])
        assert not gradients(layer, x)[1]["weight"].isfinite().any()


def test_inputs_too_large_to_square_in_float32_are_exact_too() -> None:
    torch.manual_seed(0)
    check(nn.Linear(6, 4), torch.randn(9, 6) * 1e25)


def test_inputs_too_large_to_square_at_all_give_no_made_up_gradient() -> None:
    layer = tract_hub.enable(nn.Linear(6, 4).double(), stems=[""])
    x = torch.full((9, 6), 1e200, dtype=torch.double)
    assert not gradients(layer, x)[1]["weight"].isfinite().any()


def test_a_non_finite_gradient_from_above_stays_non_finite() -> None:
    layer = tract_hub.enable(nn.Linear(6, 4), stems=[""])
    (layer(torch.randn(9, 6)) * float("inf")).sum().backward()
    assert not layer.weight.grad.isfinite().all()
