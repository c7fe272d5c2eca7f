"""``scope="global"`` in one process: all backwards of a step count as one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 3))
    return tract_hub.enable(net.double(), scope="global")


@pytest.fixture
def x() -> Tensor:
    images = torch.randn(12, 3, 12, 12, generator=torch.Generator().manual_seed(1)).cumsum(-1)
    return (images / images.std()).double()


def expected(model: nn.Module, x: Tensor, rows: Tensor | None = None, lam: float = 0.1) -> Tensor:
    """The closed form over a batch; over the rows of another, where there are some."""
    ordinary = tract_hub.disable(copy.deepcopy(model))
    (raw,) = torch.autograd.grad(ordinary(x).square().sum(), ordinary[0].weight)
    return closed_form(raw, layer_rows(model[0], x if rows is None else rows), lam)


def backward(model: nn.Module, x: Tensor, parts: int = 1) -> None:
    for part in x.chunk(parts):
        model(part).square().sum().backward()


def assert_step(model: nn.Module, wanted: Tensor) -> None:
    tract_hub.finish(model)
    assert relative_error(model[0].weight.grad, wanted) < 1e-11


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_backwards_add_up_to_the_gradient_of_all_rows(model, x: Tensor, parts: int) -> None:
    backward(model, x, parts)
    ordinary = tract_hub.disable(copy.deepcopy(model))
    ordinary.zero_grad()
    backward(ordinary, x, parts)
    assert torch.equal(model[0].weight.grad, ordinary[0].weight.grad)  # until it is finished
    assert_step(model, expected(model, x))
    local = tract_hub.enable(ordinary, scope="local")
    local.zero_grad()
    backward(local, x, parts)  # each backward by its own rows: not the same
    assert (relative_error(local[0].weight.grad, expected(model, x)) > 1e-3) is (parts > 1)


def test_the_optimizers_step_finishes_what_nobody_has(model, x: Tensor) -> None:
    before, wanted = model[0].weight.detach().clone(), expected(model, x)
    backward(model, x, 2)
    SGD(model.parameters(), 1.0).step()
    assert relative_error(before - model[0].weight.detach(), wanted) < 1e-10


def test_finishing_twice_is_finishing_once(model, x: Tensor) -> None:
    backward(model, x)
    tract_hub.finish(model)
    SGD(model.parameters(), 0.0).step()
    assert_step(model, expected(model, x))


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("scale", [1.0, float("inf")], ids=["dropped", "overflowed"])
def test_a_step_that_was_skipped_leaves_nothing_behind(
    model, x: Tensor, to_none: bool, scale: float
) -> None:
    backward(model, x.flip(-1) * scale, 2)
    model.zero_grad(set_to_none=to_none)
    backward(model, x, 3)
    assert_step(model, expected(model, x))


def test_a_gradient_that_stays_after_a_step_is_not_corrected_again(model, x: Tensor) -> None:
    backward(model, x.flip(-1), 2)
    SGD(model.parameters(), 0.0).step()
    model.zero_grad(set_to_none=False)
    backward(model, x)
    assert_step(model, expected(model, x))


def test_the_optimizer_of_another_model_ends_no_step(model, x: Tensor) -> None:
    other = nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    backward(model, x[:6])
    SGD(other.parameters(), 0.1).step()
    backward(model, x[6:])
    assert_step(model, expected(model, x))


def test_a_gradient_of_zero_counts_its_rows(model, x: Tensor) -> None:
    (model(x[:6]).square().sum() * 0).backward()
    backward(model, x[6:])
    assert_step(model, expected(model, x[6:], rows=x))


def test_a_forward_without_a_backward_does_not_count(model, x: Tensor) -> None:
    kept = model(x.flip(-1))
    with torch.no_grad():
        model(x.flip(-1))
    model.eval()(x)
    backward(model.train(), x)
    assert_step(model, expected(model, x))
    del kept


def test_two_forwards_of_one_backward_count_both(model, x: Tensor) -> None:
    sum(model(part).square().sum() for part in x.chunk(2)).backward()
    assert_step(model, expected(model, x))


def test_gradients_of_single_losses_leave_the_step_right(model, x: Tensor) -> None:
    """As PCGrad and logs of gradients by loss take them: zero_grad between two backwards."""
    output, kept = model(x), []
    for part in (0, 1):
        model.zero_grad()
        output[:, part].square().sum().backward(retain_graph=True)
        kept.append(model[0].weight.grad.clone())
    model[0].weight.grad = sum(kept)
    assert_step(model, expected(model, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_stem_counts_once(model, x: Tensor, reentrant: bool) -> None:
    checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    assert_step(model, expected(model, x))


def test_another_lambda_holds_for_the_steps_that_begin_later(model, x: Tensor) -> None:
    tract_hub.enable(model, lam=0.7, scope="global")
    backward(model, x, 2)
    assert_step(model, expected(model, x, lam=0.7))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_in_mid_step_begins_a_step_of_its_own(model, x: Tensor, twin: Callable) -> None:
    backward(model, x[:6])
    other = twin(model)
    other.zero_grad()
    backward(other, x, 3)
    assert_step(other, expected(model, x))
    backward(model, x[6:])
    assert_step(model, expected(model, x))


def test_a_step_that_runs_the_backward_itself_is_refused_once_it_used_the_gradient(
    model, x: Tensor
) -> None:
    optimizer = SGD(model.parameters(), 0.0)
    with pytest.raises(tract_hub.TractError, match=r"tract_hub.finish\(model\)"):
        optimizer.step(lambda: backward(model, x))
    model.zero_grad()
    optimizer.step(lambda: (backward(model, x), tract_hub.finish(model)))
    assert relative_error(model[0].weight.grad, expected(model, x)) < 1e-11


@pytest.mark.parametrize("zeroes", [True, False])
def test_the_step_of_an_optimizer_that_is_not_torchs_is_not_passed_over(
    model, x: Tensor, zeroes: bool
) -> None:
    def step() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
        model.zero_grad(set_to_none=zeroes)

    backward(model, x)
    step()  # as fastai's, which no hook of torch sees
    with pytest.raises(tract_hub.TractError, match=r"tract_hub.finish\(model\)"):
        backward(model, x)
    model.zero_grad()
    for _ in range(2):
        backward(model, x, 2)
        wanted = expected(model, x)
        assert_step(model, wanted)
        step()


def test_what_cannot_be_summed_is_refused(model, x: Tensor) -> None:
    parameters = dict(model.named_parameters())
    with pytest.raises(tract_hub.TractError, match=r"torch\.func.*scope='local'"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    derived = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    with pytest.raises(tract_hub.UnsupportedStemError, match="scope='local'"):
        tract_hub.enable(derived, scope="global")
    assert tract_hub.status(derived) == ()


def test_a_compiled_model_sums_outside_of_its_graph(model, x: Tensor) -> None:
    torch._dynamo.reset()
    for part in x.chunk(2):
        torch.compile(model, backend="aot_eager")(part).square().sum().backward()
    assert_step(model, expected(model, x))
    with pytest.raises(Exception, match=r"without fullgraph"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)


def test_disable_removes_the_hook_of_optimizers(model, x: Tensor) -> None:
    from torch.optim import optimizer as table  # where torch keeps the hooks of all optimizers

    before = len(table._global_optimizer_pre_hooks), len(table._global_optimizer_post_hooks)
    backward(model, x)
    tract_hub.disable(model)
    after = len(table._global_optimizer_pre_hooks), len(table._global_optimizer_post_hooks)
    assert after == before
