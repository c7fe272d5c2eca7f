"""On a GPU: the closed form in every precision, without waiting for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [None, *HALVES]  # of autocast
LAYERS = {
    "7 x 7": lambda: nn.Conv2d(3, 8, 7, 2, 3),
    "3 x 3": lambda: nn.Conv2d(3, 8, 3, 1, 1),
    "8 x 8": lambda: nn.Conv2d(3, 8, 8, 8),
    "patches": lambda: nn.Conv2d(3, 8, 16, 16),
    "dilated": lambda: nn.Conv2d(3, 8, 3, 2, 1, dilation=2),
    "circular": lambda: nn.Conv2d(3, 8, 5, 2, 2, padding_mode="circular"),
    "same": lambda: nn.Conv2d(3, 8, 4, padding="same"),
}


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    flags = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with flags:
        yield


def images(batch: int = 8, side: int = 64) -> Tensor:
    return torch.randn(batch, 3, side, side, device="cuda")


def weight_gradient(layer: nn.Module, x: Tensor, dtype: torch.dtype | None, run=None) -> Tensor:
    """The gradient of a loss that weighs every output."""
    layer.zero_grad()
    with torch.autocast("cuda", dtype) if dtype else nullcontext():
        output = (layer if run is None else run)(x)
    weights = torch.linspace(-1, 1, output.numel(), device="cuda").view(output.shape)
    (output * weights).sum().backward()
    return next(layer.parameters()).grad.clone()


def expected(gradient: Tensor, layer: nn.Module, x: Tensor, lam: float, dtype=None) -> Tensor:
    """The closed form of an ordinary gradient, for the input as the layer multiplies it."""
    rows = layer_rows(copy.deepcopy(layer).cpu(), x.to(dtype or x.dtype).cpu())
    return closed_form(gradient.cpu(), rows, lam)


def correction_error(layer: nn.Module, x: Tensor, lam: float, dtype=None, run=None) -> float:
    """Relative error against the closed form of the ordinary gradient.

    Or, where that is less, of the exact gradient, less the ordinary gradient's own error: fewer
    rows than features are corrected before half precision rounds the gradient of the weight.
    """
    ordinary = weight_gradient(tract_hub.disable(layer), x, dtype)
    twin, rounded = copy.deepcopy(layer).cpu().double(), x.to(dtype or x.dtype).cpu().double()
    output = twin(rounded)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.double).view(output.shape)
    (exact,) = torch.autograd.grad(output, [twin.weight], weights)
    corrected = weight_gradient(tract_hub.enable(layer, lam, stems=[""]), x, dtype, run).cpu()
    tract_hub.disable(layer)
    of_ordinary = expected(ordinary, layer, x, lam, dtype)
    of_exact = expected(exact, layer, x, lam, dtype)
    own = relative_error(of_ordinary, of_exact)
    error = relative_error(corrected, of_ordinary)
    return min(error, relative_error(corrected, of_exact) - own) if dtype else error


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_gets_the_closed_form(name: str, dtype, form: torch.memory_format) -> None:
    layer = LAYERS[name]().cuda().to(memory_format=form)
    x = images().to(memory_format=form)
    assert correction_error(layer, x, 0.1, dtype) <= (2e-3 if dtype else 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_float64_stays_float64(name: str) -> None:
    assert correction_error(LAYERS[name]().cuda().double(), images().double(), 0.1) <= 1e-11


@pytest.mark.parametrize("dtype", HALVES)
def test_a_model_in_half_precision_gets_it_to_its_own_precision(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(3, 8, 7, 2, 3).to("cuda", dtype)
    assert correction_error(layer, images().to(dtype), 0.1) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9,), (700, 9), (3, 70, 9), (5, 9)])
def test_a_linear_layer_gets_the_closed_form(shape: tuple[int, ...], dtype) -> None:
    x = torch.randn(shape, device="cuda")
    assert correction_error(nn.Linear(9, 4).cuda(), x, 0.1, dtype) <= (2e-3 if dtype else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_have_a_matrix_each(dtype) -> None:
    layer, x = nn.Conv2d(6, 8, 5, 2, groups=2).cuda(), torch.randn(4, 6, 40, 40, device="cuda")
    assert correction_error(layer, x, 0.1, dtype) <= (2e-3 if dtype else 1e-5)


@pytest.mark.parametrize("lam", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "fill",
    {
        "constant": lambda x: torch.full_like(x, 0.7),
        "zero": torch.zeros_like,
        "one-hot": lambda x: (torch.arange(x.numel(), device="cuda") == 5).view(x.shape).to(x),
        "bytes": lambda x: (x.abs() * 255).round().clamp(max=255),
        "huge": lambda x: x * 1e4,
        "ramp": lambda x: torch.linspace(-200, 200, 64, device="cuda").expand_as(x),
    }.values(),
    ids=["constant", "zero", "one-hot", "bytes", "huge", "ramp"],
)
@pytest.mark.parametrize("name", ["7 x 7", "8 x 8"])
def test_extreme_inputs_are_exact(name: str, fill, dtype, lam: float) -> None:
    x = fill(images(32))
    tolerance = 2e-3 if dtype else 1e-5
    features = LAYERS[name]().weight[0].numel()
    rounding = 8 * torch.finfo(torch.float32).eps * features * float(x.square().mean()) / lam
    if dtype and rounding < 1:  # λ is above the rounding of sums in float32, but not by far
        tolerance = max(tolerance, rounding)
    if x.abs().max() > 100 and lam < 1e-3:
        tolerance = 1e-2  # float64, in which the closed form is computed too, holds no more
    assert correction_error(LAYERS[name]().cuda(), x, lam, dtype) <= tolerance


@pytest.mark.parametrize("name", ["7 x 7", "3 x 3", "patches"])
def test_photographs_are_exact_in_half_precision(name: str, photographs: Tensor) -> None:
    x = ((photographs - photographs.mean()) / photographs.std()).cuda()
    assert correction_error(LAYERS[name]().cuda(), x, 0.1, torch.bfloat16) <= 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "repvgg_a0"])
def test_nothing_waits_for_the_gpu(name: str, dtype) -> None:
    model = tract_hub.enable(timm.create_model(name, num_classes=4).cuda())
    x = images(4, 224)

    def step() -> None:
        with torch.autocast("cuda", dtype) if dtype else nullcontext():
            output = model(x)
        output.float().square().mean().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "dtype", "mode"),
    [
        ("7 x 7", None, "default"),
        ("7 x 7", torch.bfloat16, "default"),
        ("patches", torch.bfloat16, "default"),
        ("patches", torch.bfloat16, "reduce-overhead"),
    ],
)
def test_a_compiled_layer_gets_the_closed_form(name: str, dtype, mode: str) -> None:
    layer, x = LAYERS[name]().cuda(), images(64)
    exact = expected(weight_gradient(layer, x, dtype), layer, x, 0.1, dtype)
    compiled = torch.compile(tract_hub.enable(layer, stems=[""]), fullgraph=True, mode=mode)
    for _ in range(4):  # warm-up, recording, replay
        corrected = weight_gradient(layer, x, dtype, compiled)
        assert relative_error(corrected.cpu(), exact) <= (2e-3 if dtype else 1e-5)


def test_a_step_recorded_as_a_cuda_graph_follows_its_input() -> None:
    layer, static = nn.Conv2d(3, 8, 7, 2, 3).cuda(), images()
    tract_hub.enable(layer, stems=[""])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            weight_gradient(layer, static, torch.bfloat16)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        output = layer(static)
        output.square().mean().backward()
    fresh = images() * 2
    static.copy_(fresh)
    graph.replay()
    got = layer.weight.grad.clone()
    tract_hub.disable(layer).zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        output = layer(fresh)
    output.square().mean().backward()
    exact = expected(layer.weight.grad, layer, fresh, 0.1, torch.bfloat16)
    assert relative_error(got.cpu(), exact) <= 2e-3


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_two_forwards_before_a_backward_keep_a_matrix_each(dtype) -> None:
    layer, x, y = nn.Conv2d(3, 8, 7, 2, 3).cuda(), images(), images() * 3
    tract_hub.enable(layer, stems=[""])
    apart = weight_gradient(layer, x, dtype) + weight_gradient(layer, y, dtype)
    layer.zero_grad()
    losses = []
    for each in (x, y):
        with torch.autocast("cuda", dtype) if dtype else nullcontext():
            output = layer(each)
        weights = torch.linspace(-1, 1, output.numel(), device="cuda").view(output.shape)
        losses.append((output * weights).sum())
    sum(losses).backward()
    assert relative_error(layer.weight.grad, apart) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_func_gives_the_same_gradient(dtype) -> None:
    layer, x = tract_hub.enable(nn.Conv2d(3, 8, 7, 2, 3).cuda(), stems=[""]), images()
    expected_gradient = weight_gradient(layer, x, dtype)
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cuda", dtype) if dtype else nullcontext():
            output = torch.func.functional_call(layer, weights, (x,))
        return (
            output * torch.linspace(-1, 1, output.numel(), device="cuda").view(output.shape)
        ).sum()

    got = torch.func.grad(loss)(weights)["weight"]
    assert relative_error(got, expected_gradient) <= (2e-3 if dtype else 1e-5)


@pytest.mark.parametrize("way", ["on the CPU", "reentrant", "not reentrant", "another stream"])
def test_activations_kept_elsewhere_give_the_same_gradient(way: str) -> None:
    layer, x = nn.Conv2d(3, 8, 16, 16).cuda(), images(side=224).requires_grad_()

    def run(x: Tensor) -> Tensor:
        if way == "on the CPU":
            with torch.autograd.graph.save_on_cpu(pin_memory=True):
                return layer(x)
        return checkpoint(layer, x, use_reentrant=way == "reentrant")

    if way != "another stream":
        assert correction_error(layer, x, 0.1, torch.bfloat16, run) <= 2e-3
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert correction_error(layer, x, 0.1, torch.bfloat16) <= 2e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["7 x 7", "patches"])
def test_a_non_finite_input_gives_a_non_finite_gradient(name: str, dtype, bad: float) -> None:
    layer = tract_hub.enable(LAYERS[name]().cuda(), stems=[""])
    x = images()
    x.view(-1)[3] = bad
    assert not weight_gradient(layer, x, dtype).isfinite().any()
    assert weight_gradient(layer, images(), dtype).isfinite().all()


def test_a_grad_scaler_skips_the_step_of_an_overflow() -> None:
    layer = tract_hub.enable(nn.Conv2d(3, 8, 3).cuda(), stems=[""])
    optimizer, scaler = torch.optim.SGD(layer.parameters(), 0.1), torch.amp.GradScaler("cuda")
    for scale, moves in ((1.0, True), (float("inf"), False)):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = layer(images() * scale).float().square().mean() * 1e-3
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight, before) is not moves


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory_stays_small_and_does_not_grow_with_the_batch(dtype) -> None:
    def peak(layer: nn.Module, batch: int) -> float:
        x = images(batch, 224)
        torch.cuda.reset_peak_memory_stats()
        weight_gradient(layer, x, dtype)
        return torch.cuda.max_memory_allocated() / 2**20

    layer, batches = nn.Conv2d(3, 64, 7, 2, 3).cuda(), (64, 128, 256)
    ordinary = [peak(layer, batch) for batch in batches]
    tract_hub.enable(layer, stems=[""])
    added = [peak(layer, batch) - mib for batch, mib in zip(batches, ordinary, strict=True)]
    assert max(added) < 64, added
    assert max(added) - min(added) < 16, added


@pytest.mark.filterwarnings("ignore:barrier")
def test_rows_of_a_step_are_summed_over_nccl(tmp_path: Path) -> None:
    layer, parts = nn.Conv2d(3, 8, 7, 2, 3).cuda(), images(16).chunk(2)
    ordinary = sum(weight_gradient(layer, part, None) for part in parts)
    exact = expected(ordinary, layer, torch.cat(parts), 0.1)
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("nccl", init_method=store, world_size=1, rank=0)
    try:
        tract_hub.enable(layer, stems=[""], scope="global")
        wrapped = nn.parallel.DistributedDataParallel(layer)
        layer.zero_grad()
        for index, part in enumerate(parts):
            with wrapped.no_sync() if index == 0 else nullcontext():
                output = wrapped(part)
                weights = torch.linspace(-1, 1, output.numel(), device="cuda")
                (output * weights.view(output.shape)).sum().backward()
        tract_hub.finish(layer)
        assert relative_error(layer.weight.grad.cpu(), exact) <= 1e-5
    finally:
        torch.distributed.destroy_process_group()
