"""Weights that are computed, used several times, frozen, recomputed: still one closed form."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tract_hub
from tests.oracle import closed_form, conv_rows, corrected_gradients, relative_error


class LowRank(nn.Module):
    """A parametrization in the manner of LoRA."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight[0].numel()) * 0.1)
        self.up = nn.Parameter(torch.randn(len(weight), 2) * 0.1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def low_rank(conv: nn.Module) -> nn.Module:
    parametrize.register_parametrization(conv, "weight", LowRank(conv.weight))
    return conv


def huggingface_standardized(*args, **kwargs) -> nn.Module:
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

    return WeightStandardizedConv2d(*args, **kwargs)


DERIVED: dict[str, Callable[[], nn.Module]] = {
    "StdConv2d": lambda: timm.layers.StdConv2d(3, 8, 3, stride=2, padding=1),
    "StdConv2dSame": lambda: timm.layers.StdConv2dSame(3, 8, 3, stride=2),
    "ScaledStdConv2d": lambda: timm.layers.ScaledStdConv2d(3, 8, 3, stride=2, padding=1),
    "ScaledStdConv2dSame": lambda: timm.layers.ScaledStdConv2dSame(3, 8, 3, stride=2),
    "Conv2dSame": lambda: timm.layers.Conv2dSame(3, 8, 3, stride=2),
    "BiT": lambda: huggingface_standardized(3, 8, 3, stride=2, padding="SAME"),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
    "weight_norm (hook)": lambda: weight_norm(nn.Conv2d(3, 8, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)),
    "spectral_norm (hook)": lambda: spectral_norm(nn.Conv2d(3, 8, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Conv2d(3, 8, 2)),
    "low rank": lambda: low_rank(nn.Conv2d(3, 8, 3)),
}


def record_convolution(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict, Tensor]:
    """Run a layer; return the weight its convolution used, its geometry, and its input."""
    calls = []
    ordinary = F.conv2d

    def spy(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        calls.append((weight, geometry, input, ordinary(input, weight, bias, **geometry)))
        return calls[-1][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", spy)
        layer(x)
    (call,) = calls
    return call


@pytest.mark.parametrize("kind", DERIVED)
def test_a_derived_weight_is_corrected_where_the_operation_used_it(kind: str) -> None:
    torch.manual_seed(0)
    layer = DERIVED[kind]().double()
    x = torch.randn(4, 3, 11, 11).double()
    with torch.no_grad():
        layer(x)  # power iterations and other states settle alike in both
    ordinary = copy.deepcopy(layer)

    used, geometry, padded, output = record_convolution(ordinary, x)
    weigh = torch.randn_like(output)
    names = [n for n, p in ordinary.named_parameters() if "bias" not in n]
    (raw,) = torch.autograd.grad((output * weigh).sum(), used, retain_graph=True)
    corrected = closed_form(raw, conv_rows(padded, used, **geometry), 0.1)
    parameters = [ordinary.get_parameter(n) for n in names]
    if used is parameters[0]:
        expected = [corrected]
    else:
        expected = torch.autograd.grad(used, parameters, corrected)

    tract_hub.enable(layer, stems=[""])
    result = layer(x)
    assert torch.equal(result, output)
    (result * weigh).sum().backward()
    for name, wanted in zip(names, expected, strict=True):
        assert relative_error(layer.get_parameter(name).grad, wanted) < 1e-11


class Applies(nn.Module):
    """Applies its weight in a way of its own."""

    def __init__(self, way: Callable[[Applies, Tensor], Tensor]) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.randn(6, 20) * 0.2)
        self.register_buffer("basis", torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def written_into_zeros(m: Applies, x: Tensor) -> Tensor:
    new = torch.zeros(x.shape, dtype=x.dtype)
    new[:] = x
    return F.linear(new, m.weight)


def written_into_parts(m: Applies, x: Tensor) -> Tensor:
    new = torch.zeros(x.shape, dtype=x.dtype)
    new[:3].copy_(x[:3])
    new[3:].copy_(x[3:])
    return F.linear(new, m.weight)


WAYS = {
    # Products that make the weight, with a constant on the left.
    "constant times weight": lambda m, x: F.linear(x, m.basis @ m.weight),
    "constant made in the forward": lambda m, x: F.linear(
        x, torch.ones(6, 6, dtype=x.dtype) @ m.weight
    ),
    # Inputs that have met the weight, and are pixels all the same.
    "input moved to the weight": lambda m, x: F.linear(x.to(m.weight), m.weight),
    "input shifted": lambda m, x: F.linear(x - m.weight.new_tensor(0.1), m.weight),
    "input copied": lambda m, x: F.linear(m.weight.new_zeros(x.shape).copy_(x), m.weight),
    "input written": written_into_zeros,
    "input written in parts": written_into_parts,
    "input scaled": lambda m, x: F.linear(x / m.weight.detach().norm(), m.weight),
    # Products of features, which come from the weight and are none.
    "similarity": lambda m, x: F.linear(x, m.weight).relu() @ F.linear(x, m.weight).relu().t(),
    "anchors": lambda m, x: m.basis @ F.linear(x, m.weight).relu().t(),
    "cosine": lambda m, x: m.basis @ (F.linear(x, m.weight) / m.weight.norm(dim=1)).t(),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize("way", WAYS)
def test_weights_and_features_are_told_apart(way: str, rows: int, compiled: bool) -> None:
    if compiled and way == "constant made in the forward":
        pytest.skip("a graph that is compiled does not show what is written into a constant")
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = Applies(WAYS[way]).double(), torch.randn(rows, 20).double()
    expected = corrected_gradients(model, lambda: model(x).square().mean())["weight"]
    tract_hub.enable(model, example_inputs=x).zero_grad()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    run(x).square().mean().backward()
    assert relative_error(model.weight.grad, expected) < 1e-11


@pytest.mark.parametrize("kind", ["matrix_exp", "cayley", "householder"])
def test_an_orthogonal_linear_layer_is_corrected_once(kind: str) -> None:
    torch.manual_seed(0)
    layer = parametrizations.orthogonal(nn.Linear(12, 8), orthogonal_map=kind).double()
    x = torch.randn(40, 12).double()
    expected = corrected_gradients(layer, lambda: layer(x).square().sum())
    tract_hub.enable(layer).zero_grad()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-11


def assert_each_use_is_corrected(model: nn.Module, weight: Tensor, uses: list, x: Tensor) -> None:
    """``uses``: for each call, the input that it sees, and a loss in which it alone counts."""
    expected = 0
    for seen, loss in uses:
        (raw,) = torch.autograd.grad(loss(x), weight)
        expected = expected + closed_form(raw, conv_rows(seen(x), raw), 0.1)
    tract_hub.enable(model)
    assert [state.weight_name for state in tract_hub.status(model)] == [
        name for name, parameter in model.named_parameters() if parameter is weight
    ]
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        weight.grad = None
        run(x).backward()
        assert relative_error(weight.grad, expected) < 1e-11
    for reentrant in (True, False):
        weight.grad = None
        checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant).backward()
        assert relative_error(weight.grad, expected) < 1e-11


class Twice(nn.Module):
    """Applies its stem to two views of the image, of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x).square().mean() - 2 * self.stem(x[..., ::2, ::2]).square().mean()


class Siamese(nn.Module):
    """Two modules that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.right.weight = self.stem.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x).square().mean() - 2 * self.right(x[..., ::2, ::2]).square().mean()


class Both(nn.Module):
    """Applies its stem by calling it, and by a functional call on its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        second = F.conv2d(x[..., ::2, ::2], self.stem.weight, self.stem.bias)
        return self.stem(x).square().mean() - 2 * second.square().mean()


@pytest.mark.parametrize("kind", [Twice, Siamese, Both])
def test_each_use_of_a_weight_is_divided_by_its_own_gram(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().double()
    stem = model.stem

    def whole(x: Tensor) -> Tensor:
        return stem(x).square().mean()

    def half(x: Tensor) -> Tensor:
        bias = stem.bias if kind is not Siamese else model.right.bias
        return -2 * F.conv2d(x[..., ::2, ::2], stem.weight, bias).square().mean()

    uses = [(lambda x: x, whole), (lambda x: x[..., ::2, ::2], half)]
    assert_each_use_is_corrected(model, stem.weight, uses, torch.randn(4, 3, 12, 12).double())


@pytest.mark.parametrize("stems", [["stem"], ["right"], ["stem", "right"]])
def test_a_named_layer_brings_the_one_that_has_its_weight_too(stems: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Siamese().double(), torch.randn(4, 3, 12, 12).double()
    found = tract_hub.enable(copy.deepcopy(model))
    named = tract_hub.enable(model, stems=stems)
    for each in (found, named):
        each(x).backward()
    assert torch.equal(named.stem.weight.grad, found.stem.weight.grad)


def test_the_use_of_a_weight_that_is_no_first_layer_keeps_its_ordinary_gradient() -> None:
    """As in an autoencoder with tied weights: the decoder's use of the kernel is left alone."""
    torch.manual_seed(0)
    stem, decoder = nn.Conv2d(3, 4, 3).double(), nn.ConvTranspose2d(4, 3, 3).double()
    x, untied = torch.randn(4, 3, 9, 9).double(), copy.deepcopy((stem, decoder))
    untied[1].weight.data.copy_(untied[0].weight)
    nn.Sequential(*untied)(x).square().sum().backward()
    raw = untied[0].weight.grad
    expected = closed_form(raw, conv_rows(x, raw), 0.1) + untied[1].weight.grad
    decoder.weight = stem.weight
    model = tract_hub.enable(nn.Sequential(stem, decoder), stems=["0"])
    model(x).square().sum().backward()
    assert relative_error(stem.weight.grad, expected) < 1e-11


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    """A model with TrAct on, an input, and the gradient that one backward must give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 3)).double()
    x = torch.randn(4, 3, 10, 10).double()
    (raw,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    return tract_hub.enable(model), x, closed_form(raw, conv_rows(x, raw), 0.1)


def test_two_backwards_through_one_graph_give_twice_the_gradient(case) -> None:
    model, x, expected = case
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert relative_error(model[0].weight.grad, 2 * expected) < 1e-11


def test_forwards_without_a_backward_leave_no_trace(case) -> None:
    model, x, expected = case
    model(x * 7)
    with torch.no_grad():
        model(x * 9)
    model(x).square().sum().backward()
    assert relative_error(model[0].weight.grad, expected) < 1e-11


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_stem_counts_each_row_once(case, reentrant: bool) -> None:
    model, x, expected = case
    hidden = checkpoint(model[:2], x.clone().requires_grad_(), use_reentrant=reentrant)
    model[2](hidden).square().sum().backward()
    assert relative_error(model[0].weight.grad, expected) < 1e-11


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_wholly_checkpointed_model_counts_each_row_once(case, reentrant: bool) -> None:
    model, x, expected = case
    checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    assert relative_error(model[0].weight.grad, expected) < 1e-11


def few_rows() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 2)).double()
    return model, torch.randn(4, 3, 8, 8).double()


def test_a_selective_checkpoint_may_keep_the_output_of_a_stem_of_few_rows() -> None:
    model, x = few_rows()
    expected = corrected_gradients(model, lambda: model(x).square().sum())
    kept = [torch.ops.aten.convolution.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    tract_hub.enable(model).zero_grad()
    output = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    output.square().sum().backward()
    assert relative_error(model[0].weight.grad, expected["0.weight"]) < 1e-11


def test_a_batch_of_gradients_of_few_rows_is_each_corrected() -> None:
    model, x = few_rows()
    weight, output = model[0].weight, tract_hub.enable(model)(x)
    ways = torch.eye(output.numel()).double().view(-1, *output.shape)
    (batch,) = torch.autograd.grad(output, weight, ways, retain_graph=True, is_grads_batched=True)
    for way, got in zip(ways, batch, strict=True):
        (expected,) = torch.autograd.grad(output, weight, way, retain_graph=True)
        assert relative_error(got, expected) < 1e-11


def test_a_stem_can_be_frozen_and_unfrozen(case) -> None:
    model, x, expected = case
    model[0].weight.requires_grad_(False)
    model(x).square().sum().backward()
    assert model[0].weight.grad is None
    assert tract_hub.status(model)[0].frozen
    model[0].weight.requires_grad_(True)
    model(x).square().sum().backward()
    assert relative_error(model[0].weight.grad, expected) < 1e-11


def test_an_exception_in_the_forward_leaves_nothing_behind(case) -> None:
    model, x, expected = case
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    assert torch.overrides._get_current_function_mode_stack() == []
    model(x).square().sum().backward()
    assert relative_error(model[0].weight.grad, expected) < 1e-11


def test_an_interrupted_forward_leaves_nothing_that_acts(case) -> None:
    model, x, expected = case
    interrupt = model[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(x)
    interrupt.remove()
    try:
        model(x).square().sum().backward()
        assert relative_error(model[0].weight.grad, expected) < 1e-11
    finally:
        while torch.overrides._get_current_function_mode_stack():
            torch.overrides._pop_mode()


def test_eval_mode_is_the_ordinary_model_and_a_gradient_through_it_is_reported(case) -> None:
    model, x, _ = case
    model.eval()
    with pytest.warns(tract_hub.TractWarning, match=r"'0.weight'.*train"):
        model(x).square().sum().backward()
    ordinary = tract_hub.disable(copy.deepcopy(model))
    ordinary.zero_grad()
    ordinary(x).square().sum().backward()
    assert torch.equal(model[0].weight.grad, ordinary[0].weight.grad)


def test_a_branch_that_leaves_the_stem_out_is_no_news() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
            self.use = True

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x) if self.use else x)

    model = tract_hub.enable(Skips())
    for model.use in (True, False, True):
        model(torch.randn(2, 4)).sum().backward()


def test_threads_do_not_mix_their_rows(case) -> None:
    model, x, expected = case
    inputs = [x, x * 3, x - 1, x.flip(0) * 0.5]
    alone = [torch.autograd.grad(model(i).square().sum(), model[0].weight)[0] for i in inputs]
    meet = threading.Barrier(len(inputs))

    def step(image: Tensor) -> Tensor:
        found = torch.zeros_like(expected)
        for _ in range(20):
            meet.wait()
            (found,) = torch.autograd.grad(model(image).square().sum(), model[0].weight)
        return found

    with ThreadPoolExecutor(len(inputs)) as pool:
        together = list(pool.map(step, inputs))
    for one, other in zip(alone, together, strict=True):
        assert relative_error(other, one) < 1e-12


def test_a_hypergradient_passes_through_the_correction(case) -> None:
    model, x, expected = case
    weight = model[0].weight
    (first,) = torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)
    assert relative_error(first.detach(), expected) < 1e-11
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert second.isfinite().all() and second.abs().sum() > 0


def test_forward_mode_derivatives_are_those_of_the_ordinary_model(case) -> None:
    model, x, _ = case
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def run(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (x,))

    _, tangent = torch.func.jvp(run, (weights,), (weights,))
    tract_hub.disable(model)
    _, ordinary = torch.func.jvp(run, (weights,), (weights,))
    assert torch.equal(tangent, ordinary)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 8, 7), nn.Conv2d(4, 8, 3, groups=2), nn.Linear(9, 5)]
)
def test_a_compiler_gets_the_strides_that_it_counts_on(layer: nn.Module) -> None:
    """Inductor asserts them in the code that it makes, where aot_eager looks at nothing."""
    torch.compiler.reset()
    # Where ATEN_CPU_CAPABILITY turns AVX-512 off, inductor still writes code of its width, wrongly.
    width = {"AVX2": 256, "AVX512": None}.get(torch.backends.cpu.get_cpu_capability(), 1)
    size = (
        (6, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 16, 16)
    )
    x, gradients = torch.randn(8, *size), []
    tract_hub.enable(layer, example_inputs=x[0])
    for model in (layer, torch.compile(layer, options={"cpp.simdlen": width})):
        layer.zero_grad()
        model(x.flatten(0, 1)).square().mean().backward()
        gradients.append(layer.weight.grad)
    assert relative_error(*gradients) < 1e-5
