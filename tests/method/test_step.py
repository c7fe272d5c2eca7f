"""``scope="global"`` in one process: all backwards of a step count as one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error

BATCH = 12


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 3))
    return tract_hub.enable(net.double(), scope="global")


@pytest.fixture
def x() -> Tensor:
    images = torch.randn(BATCH, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return images.cumsum(-1).double()


def expected(model: nn.Module, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """The closed form over a batch; over the rows of another, where there are some."""
    ordinary = tract_hub.disable(copy.deepcopy(model))
    (raw,) = torch.autograd.grad(ordinary(x).square().sum(), ordinary[0].weight)
    return closed_form(raw, layer_rows(model[0], x if rows is None else rows), 0.1)


def accumulate(model: nn.Module, x: Tensor, parts: int) -> Tensor:
    for part in x.chunk(parts):
        model(part).square().sum().backward()
    return model[0].weight.grad


def assert_whole(model: nn.Module, x: Tensor, parts: int = 3) -> None:
    assert relative_error(accumulate(model, x, parts), expected(model, x)) < 1e-11


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_backwards_add_up_to_the_gradient_of_all_rows(
    model: nn.Module, x: Tensor, parts: int
) -> None:
    assert_whole(model, x, parts)
    ordinary = tract_hub.enable(tract_hub.disable(copy.deepcopy(model)), scope="local")
    ordinary.zero_grad()
    apart = accumulate(ordinary, x, parts)  # each backward by its own rows: not the same
    assert (relative_error(apart, expected(model, x)) > 1e-3) is (parts > 1)


def test_every_backward_leaves_the_gradient_of_all_rows_so_far(model: nn.Module, x: Tensor) -> None:
    for end in (4, 8, 12):
        model(x[end - 4 : end]).square().sum().backward()
        assert relative_error(model[0].weight.grad, expected(model, x[:end])) < 1e-11


def _optimizer_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def _none(model: nn.Module) -> None:
    model.zero_grad()


def _zero_in_place(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    ("end", "scale"),
    [
        (_optimizer_step, 1.0),
        (_none, 1.0),
        (_none, float("inf")),  # as after a step that GradScaler skips
        (_zero_in_place, 1.0),
        (_zero_in_place, float("inf")),
    ],
)
def test_a_step_that_ended_leaves_nothing_behind(
    model: nn.Module, x: Tensor, end: Callable[[nn.Module], None], scale: float
) -> None:
    accumulate(model, x.flip(-1) * scale, 2)
    end(model)
    assert_whole(model, x)


def test_an_optimizer_ends_a_step_whose_gradient_stays(model: nn.Module, x: Tensor) -> None:
    before = accumulate(model, x.flip(-1), 2).clone()
    torch.optim.SGD(model.parameters(), 0.0).step()
    own = accumulate(model, x, 2) - before
    assert relative_error(own, expected(model, x)) < 1e-11


def test_the_optimizer_of_another_model_ends_no_step(model: nn.Module, x: Tensor) -> None:
    other = nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    model(x[:6]).square().sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    model(x[6:]).square().sum().backward()
    assert relative_error(model[0].weight.grad, expected(model, x)) < 1e-11


def test_a_gradient_of_zero_still_counts_its_rows(model: nn.Module, x: Tensor) -> None:
    (model(x[:6]).square().sum() * 0).backward()
    model(x[6:]).square().sum().backward()
    assert relative_error(model[0].weight.grad, expected(model, x[6:], rows=x)) < 1e-11


def test_a_forward_without_a_backward_does_not_count(model: nn.Module, x: Tensor) -> None:
    kept = model(x.flip(-1))
    with torch.no_grad():
        model(x.flip(-1))
    model.eval()(x)
    model.train()(x)
    assert_whole(model, x)
    del kept


def test_two_forwards_of_one_backward_count_both(model: nn.Module, x: Tensor) -> None:
    sum(model(part).square().sum() for part in x.chunk(2)).backward()
    assert relative_error(model[0].weight.grad, expected(model, x)) < 1e-11


def test_two_backwards_through_one_forward_count_it_once(model: nn.Module, x: Tensor) -> None:
    output = model(x)
    for part in (0, 1):
        output[:, part].square().sum().backward(retain_graph=True)
    assert relative_error(model[0].weight.grad, expected(model, x)) < 1e-11


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_stem_is_counted_once(model: nn.Module, x: Tensor, reentrant: bool) -> None:
    for part in x.chunk(3):
        pixels = part.clone().requires_grad_()
        features = torch.utils.checkpoint.checkpoint(model[0], pixels, use_reentrant=reentrant)
        model[1:](features).square().sum().backward()
    assert relative_error(model[0].weight.grad, expected(model, x)) < 1e-11


def test_autograd_grad_is_no_part_of_a_step(model: nn.Module, x: Tensor) -> None:
    model(x[:6]).square().sum().backward()
    (alone,) = torch.autograd.grad(model(x[:3]).square().sum(), model[0].weight)
    assert relative_error(alone, expected(model, x[:3])) < 1e-11
    model(x[6:]).square().sum().backward()
    assert relative_error(model[0].weight.grad, expected(model, x)) < 1e-11


def test_another_lambda_holds_for_the_whole_step(model: nn.Module, x: Tensor) -> None:
    model(x[:6]).square().sum().backward()
    with pytest.warns(tract_hub.TractWarning):
        tract_hub.enable(model, lam=0.7, scope="global")
    model(x[6:]).square().sum().backward()
    ordinary = tract_hub.disable(copy.deepcopy(model))
    (raw,) = torch.autograd.grad(ordinary(x).square().sum(), ordinary[0].weight)
    whole = closed_form(raw, layer_rows(model[0], x), 0.7)
    assert relative_error(model[0].weight.grad, whole) < 1e-11


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_in_mid_step_begins_a_step_of_its_own(model: nn.Module, x: Tensor, twin) -> None:
    model(x[:6]).square().sum().backward()
    other = twin(model)
    other.zero_grad()
    assert tract_hub.status(other) == tract_hub.status(model)
    assert_whole(other, x)
    model(x[6:]).square().sum().backward()
    assert relative_error(model[0].weight.grad, expected(model, x)) < 1e-11


def test_a_part_of_a_model_called_alone_counts(model: nn.Module, x: Tensor) -> None:
    for part in x.chunk(2):  # as timm's forward_features: the model's own forward does not run
        model[1:](model[0](part)).square().sum().backward()
    assert relative_error(model[0].weight.grad, expected(model, x)) < 1e-11


def test_a_gradient_penalty_can_differentiate_it(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward(create_graph=True)
    gradient = model[0].weight.grad
    assert gradient.requires_grad
    (second,) = torch.autograd.grad(gradient.square().sum(), model[2].weight)
    assert second.isfinite().all() and second.any()


def test_torch_func_is_refused(model: nn.Module, x: Tensor) -> None:
    parameters = dict(model.named_parameters())
    with pytest.raises(tract_hub.TractError, match=r"torch\.func"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)


def test_a_compiled_model_breaks_its_graph_at_the_stem(model: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    whole = expected(model, x)
    compiled = torch.compile(model, backend="aot_eager")
    for part in x.chunk(2):
        compiled(part).square().sum().backward()
    assert relative_error(model[0].weight.grad, whole) < 1e-11


def test_a_compiled_model_without_graph_breaks_is_refused(model: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"without fullgraph.*scope='rank'"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_that_of_the_ordinary_model(model: nn.Module, x: Tensor, strict: bool) -> None:
    def graph(exported: nn.Module) -> list[str]:
        program = torch.export.export(exported, (x,), strict=strict)
        return [str(node.target) for node in program.graph.nodes]

    assert graph(model) == graph(tract_hub.disable(copy.deepcopy(model)))
