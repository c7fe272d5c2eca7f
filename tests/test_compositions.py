"""TrAct under torch's transformations: the same gradient, or the ordinary model's graph."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import tract_hub
from tests.oracle import closed_form, conv_rows, relative_error


class Net(nn.Module):
    """A small network whose stem is what a test wants it to be."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.act = nn.ReLU()
        self.head = nn.Conv2d(6, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.stem(x)))


STEMS = {
    "Conv2d": lambda: nn.Conv2d(3, 6, 3, padding=1),
    "StdConv2d": lambda: timm.layers.StdConv2d(3, 6, 3),
    "Conv2dSame": lambda: timm.layers.Conv2dSame(3, 6, 3, stride=2),
    "two branches": lambda: timm.models.byobnet.RepVggBlock(3, 6),
}


@pytest.fixture(params=STEMS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return tract_hub.enable(Net(STEMS[request.param]()).train(), stems=None)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, run, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        assert relative_error(got[name], gradient) < 1e-5, name


def test_it_compiles_in_one_graph_to_the_same_gradient(model: nn.Module, x: Tensor) -> None:
    expected = gradients(model, model, x)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(gradients(model, run, x), expected)


@pytest.mark.parametrize("takes_gradient", [True, False])
def test_a_compiled_transform_of_torch_func_is_refused_or_left_to_python(
    x: Tensor, takes_gradient: bool
) -> None:
    model = tract_hub.enable(Net(STEMS["Conv2d"]()))
    weights = {
        name: weight if takes_gradient else weight.detach()
        for name, weight in model.named_parameters()
    }

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (x,)).square().sum()

    run = torch.compile(grad(loss), backend="aot_eager")
    assert_close(run(weights), grad(loss)(weights))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="leave the transform out"):
        torch.compile(grad(loss), backend="aot_eager", fullgraph=True)(weights)


@pytest.mark.parametrize("change", ["enable", "disable", "lam"])
def test_a_graph_compiled_before_a_change_is_not_used_after_it(x: Tensor, change: str) -> None:
    torch.manual_seed(0)
    model = Net(STEMS["Conv2d"]())
    if change != "enable":
        tract_hub.enable(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = gradients(model, compiled, x)
    if change == "disable":
        tract_hub.disable(model)
    elif change == "enable":
        tract_hub.enable(compiled)
    else:
        tract_hub.enable(compiled, lam=0.7)
    after = gradients(model, compiled, x)
    assert relative_error(after["stem.weight"], before["stem.weight"]) > 0.1
    assert_close(after, gradients(model, model, x))


def test_a_model_compiled_in_place_is_treated(x: Tensor) -> None:
    torch.manual_seed(0)
    model = tract_hub.enable(Net(STEMS["Conv2d"]()))
    expected = gradients(model, model, x)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(gradients(model, model, x), expected)


def test_a_compiled_part_of_a_model_is_treated(x: Tensor) -> None:
    torch.manual_seed(0)
    model = tract_hub.enable(Net(STEMS["Conv2d"]()))
    expected = gradients(model, model, x)
    model.stem.compile(fullgraph=True, backend="aot_eager")
    assert_close(gradients(model, model, x), expected)
    assert_close(gradients(model, model, x), expected)


def test_a_compiled_graph_follows_other_sizes() -> None:
    torch.manual_seed(0)
    model = tract_hub.enable(Net(nn.Conv2d(3, 6, 3, stride=2, padding=1)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch, side in ((4, 16), (6, 16), (7, 20), (9, 24), (4, 16)):
        x = torch.randn(batch, 3, side, side)
        assert_close(gradients(model, compiled, x), gradients(model, model, x))


@pytest.mark.parametrize(("first", "in_place"), [("ordinary", True), ("treated", False)])
def test_of_two_models_of_a_class_each_has_a_graph_of_its_own(
    x: Tensor, first: str, in_place: bool
) -> None:
    torch.manual_seed(0)
    ordinary = Net(STEMS["Conv2d"]())
    models = {"ordinary": ordinary, "treated": tract_hub.enable(copy.deepcopy(ordinary))}
    expected = {name: gradients(model, model, x) for name, model in models.items()}
    runs = dict(models)
    for name, model in models.items():
        if in_place:
            model.compile(backend="aot_eager")
        else:
            runs[name] = torch.compile(model, backend="aot_eager")
    for name in sorted(models, key=lambda name: name != first):
        assert_close(gradients(models[name], runs[name], x), expected[name])
    assert (
        relative_error(expected["treated"]["stem.weight"], expected["ordinary"]["stem.weight"])
        > 0.1
    )


def test_inductor_gives_the_same_gradient(x: Tensor) -> None:
    torch.manual_seed(0)
    model = tract_hub.enable(Net(STEMS["Conv2d"]()))
    expected = gradients(model, model, x)
    assert_close(gradients(model, torch.compile(model, fullgraph=True), x), expected)


def test_torch_func_grad_gives_the_same_gradient(model: nn.Module, x: Tensor) -> None:
    for module in model.modules():  # torch.func lets nobody move running statistics
        module.train(not isinstance(module, nn.BatchNorm2d))
    expected = gradients(model, model, x)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, (parameters, buffers), (x,)).square().sum()

    assert_close(grad(loss)(parameters), expected)


def test_vmap_gives_each_samples_own_correction(x: Tensor) -> None:
    torch.manual_seed(0)
    model = tract_hub.enable(Net(STEMS["Conv2d"]()).double())
    x = x.double()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)["stem.weight"]
    ordinary = tract_hub.disable(model)
    for sample, got in zip(x, each, strict=True):
        (raw,) = torch.autograd.grad(ordinary(sample[None]).square().sum(), model.stem.weight)
        expected = closed_form(raw, conv_rows(sample[None], raw, padding=1), 0.1)
        assert relative_error(got, expected) < 1e-11


def test_models_stacked_under_vmap_are_corrected_each_with_its_own() -> None:
    torch.manual_seed(0)
    models = [tract_hub.enable(Net(STEMS["Conv2d"]()).double()) for _ in range(2)]
    x = torch.randn(2, 4, 3, 16, 16, dtype=torch.double)
    stacked, _ = torch.func.stack_module_state(models)

    def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(models[0], weights, (x,))

    vmap(run)(stacked, x).square().sum().backward()
    for index, model in enumerate(models):
        expected = gradients(model, model, x[index])
        for name, gradient in expected.items():
            assert relative_error(stacked[name].grad[index], gradient) < 1e-12


def operations(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_export_is_that_of_the_ordinary_model(model: nn.Module, x: Tensor) -> None:
    exported = operations(torch.export.export(model, (x,)).graph)
    ordinary = operations(torch.export.export(tract_hub.disable(model), (x,)).graph)
    assert exported == ordinary


def test_jit_trace_is_that_of_the_ordinary_model(x: Tensor) -> None:
    model = tract_hub.enable(Net(STEMS["Conv2d"]()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
        ordinary = torch.jit.trace(tract_hub.disable(model), x)
    assert str(traced.inlined_graph).count("aten::") == str(ordinary.inlined_graph).count("aten::")
    assert torch.equal(traced(x), ordinary(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_adds_no_more_error_than_its_own(dtype: torch.dtype, x: Tensor) -> None:
    torch.manual_seed(0)
    model = Net(STEMS["Conv2d"]())
    weight = model.stem.weight
    with torch.autocast("cpu", dtype):
        (ordinary,) = torch.autograd.grad(model(x).float().square().sum(), weight)
        output = tract_hub.enable(model)(x)
        (corrected,) = torch.autograd.grad(output.float().square().sum(), weight)
    assert output.dtype == dtype and corrected.dtype == torch.float32
    exact = tract_hub.disable(model).double()
    (raw,) = torch.autograd.grad(exact(x.double()).square().sum(), exact.stem.weight)
    rows = conv_rows(x.double(), raw, padding=1)
    own = relative_error(ordinary, raw)
    assert relative_error(corrected, closed_form(raw, rows, 0.1)) <= own + 2e-3
    # Of the autocast gradient itself, it is the closed form to float32's precision.
    assert relative_error(corrected, closed_form(ordinary, rows, 0.1)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_keeps_its_dtypes(dtype: torch.dtype, x: Tensor) -> None:
    torch.manual_seed(0)
    model = tract_hub.enable(Net(STEMS["Conv2d"]()).to(dtype))
    model(x.to(dtype)).float().square().mean().backward()
    gradient = model.stem.weight.grad
    assert gradient.dtype == dtype and gradient.isfinite().all()


def test_a_grad_scaler_sees_overflow_and_steps_without_it(x: Tensor) -> None:
    torch.manual_seed(0)
    model = tract_hub.enable(Net(STEMS["Conv2d"]()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for image, moves in ((x, True), (torch.full_like(x, float("inf")), False)):
        before = model.stem.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(image).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.stem.weight, before) is not moves


@pytest.mark.parametrize("again", [False, True])
def test_a_compiled_model_that_calls_itself_is_treated(x: Tensor, again: bool) -> None:
    class CallsItself(Net):
        def forward(self, x: Tensor, again: bool = False) -> Tensor:
            return self(x) if again else super().forward(x)

    torch.manual_seed(0)
    model = tract_hub.enable(CallsItself(STEMS["Conv2d"]()))
    expected = gradients(model, model, x)
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(gradients(model, lambda x: compiled(x, again), x), expected)
