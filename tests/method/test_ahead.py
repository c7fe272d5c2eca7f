"""What a GPU does, as far as a CPU can show it: inverses, looks, operators."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error
from tract_hub.method import compiled, gate
from tract_hub.method.gram import matrix, sight
from tract_hub.method.gram.precision import Precision
from tract_hub.method.operations import LinearCall, read_call


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Correct by inverses made ahead; returns those that were multiplied with."""
    used: list[Tensor] = []
    times = gate.Ahead.times
    monkeypatch.setattr(gate, "_suits_ahead", lambda weight, gram: True)
    monkeypatch.setattr(
        gate.Ahead, "times", lambda self, g: used.append(self.inverse) or times(self, g)
    )
    return used


def gradient(layer: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    layer.zero_grad()
    output = (layer if run is None else run)(x)
    weights = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view(output.shape)
    (output * weights).sum().backward()
    return next(layer.parameters()).grad.clone()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("way", ["plain", "reentrant", "not reentrant", "on the CPU"])
def test_an_inverse_made_ahead_gives_the_closed_form(
    ahead: list[Tensor], groups: int, way: str
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, 5, 2, groups=groups).double()
    x = torch.randn(4, 3, 20, 20, dtype=torch.double, requires_grad=True)
    expected = closed_form(gradient(layer, x), layer_rows(layer, x), 0.1)
    tract_hub.enable(layer, stems=[""])

    def run(x: Tensor) -> Tensor:
        if way == "on the CPU":
            with torch.autograd.graph.save_on_cpu():
                return layer(x)
        return checkpoint(layer, x, use_reentrant=way == "reentrant")

    assert relative_error(gradient(layer, x, None if way == "plain" else run), expected) < 1e-12
    assert len(ahead) == 1


def test_a_second_backward_through_a_graph_that_is_kept_is_the_same(ahead: list[Tensor]) -> None:
    layer = tract_hub.enable(nn.Linear(5, 3).double(), stems=[""])
    loss = layer(torch.randn(9, 5, dtype=torch.double)).square().sum()
    first, second = (
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    assert len(ahead) == 2


def test_a_loss_that_is_kept_does_not_keep_the_matrices(ahead: list[Tensor]) -> None:
    layer = tract_hub.enable(nn.Linear(5, 3), stems=[""])
    loss = layer(torch.randn(9, 5)).square().sum()
    loss.backward()
    nodes, found = [loss.grad_fn], []
    while nodes:
        node = nodes.pop()
        found.append(getattr(node, "ahead", None))
        nodes += [below for below, _ in node.next_functions if below is not None]
    assert len(found) > 3
    assert not any(found)


def test_uses_of_one_weight_share_a_matrix(ahead: list[Tensor]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    model = nn.Sequential(layer)
    x = torch.randn(9, 5, dtype=torch.double)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.layer(x[:4]), self.layer(x[4:] * 3)])

    model = Twice()
    rows = [torch.cat([x[:4], x[4:] * 3])]
    expected = closed_form(gradient(model, x), rows, 0.1)
    tract_hub.enable(model, stems=["layer"])
    assert relative_error(gradient(model, x), expected) < 1e-12
    assert not ahead  # the inverses of each use alone are of no use


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Sum as a GPU does under autocast; returns in what, for each Gram matrix."""
    found: list[torch.dtype] = []
    summed_in = matrix._summed_in

    def noted(precision: Precision, *given) -> matrix.Gram:
        found.append(precision.products)
        return summed_in(precision, *given)

    half = Precision(torch.bfloat16, torch.float64, 4096, "sometimes", 16)
    monkeypatch.setattr(matrix, "precision_for", lambda call, rows: half)
    monkeypatch.setattr(matrix, "_summed_in", noted)
    monkeypatch.setattr(sight, "EVERY", 10)
    return found


HALF, WIDE = torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ([1] * 12, [HALF] * 12),
        ([1e4] * 3, [HALF, WIDE, WIDE, WIDE]),  # once seen, it is not summed in vain again
        ([0, 0, 0, 0, 1e4, 1], [HALF] * 5 + [WIDE, WIDE]),  # zeros say nothing
        ([1, 1e4, 1], [HALF, HALF, WIDE, WIDE]),
        ([*[1] * 9, 1e4, 1e4], [*[HALF] * 10, WIDE, WIDE]),  # the tenth is looked at
    ],
)
def test_an_input_that_is_too_rough_is_summed_in_float64_from_then_on(
    dtypes: list[torch.dtype], scales: list[float], expected: list[torch.dtype]
) -> None:
    layer = tract_hub.enable(nn.Conv2d(3, 4, 5, 2), stems=[""])
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for scale in scales:
        layer(x * scale)
    assert dtypes == expected


def test_copies_are_remembered_together_and_what_comes_from_elsewhere_is_not() -> None:
    model = tract_hub.enable(nn.Sequential(nn.Conv2d(3, 4, 5)))

    def site(model: nn.Module) -> str:
        (uses,) = next(iter(model._forward_pre_hooks.values())).__self__.forward_uses
        return uses.site

    assert site(copy.deepcopy(model)) == site(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tract_hub.method.forwards._PROCESS", "another")
        assert site(pickle.loads(pickle.dumps(model))) != site(model)


X = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "call",
    [
        read_call(torch.conv2d, (X, torch.empty(4, 6, 3, 3), None, 2, 1), {}),
        read_call(torch.conv2d, (X, torch.empty(6, 2, 3, 3), None, 1, "same", 1, 3), {}),
        read_call(torch.conv1d, (X[0], torch.empty(4, 9, 3)), {}),
        LinearCall("linear", X, torch.empty(4, 9)),
        LinearCall("matmul", X, torch.empty(9, 4)),
        LinearCall("linear", X[:0], torch.empty(4, 9)),
    ],
)
def test_operators_are_what_they_say(call: LinearCall) -> None:
    geometry = [] if call.convolution is None else compiled._flattened(call.convolution)
    arguments = (X, call.name, list(call.weight.shape), geometry, None, 0.1, "test")
    operators = torch.ops.tract_hub
    arguments = (call.input, *arguments[1:])
    torch.library.opcheck(operators.inverse.default, arguments)
    inverse = operators.inverse(*arguments)
    weight = torch.randn(call.weight.mT.shape if call.name == "matmul" else call.weight.shape)
    torch.library.opcheck(operators.gate.default, (weight, inverse))
    torch.library.opcheck(operators.multiply.default, (weight, inverse))
