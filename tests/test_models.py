"""Published models: the stem's gradient is the closed form, three ways; all else is untouched."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tract_hub
from tests import zoo
from tests.oracle import closed_form, layer_rows, relative_error

LAM = 0.1


def train_step(name: str, model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward and backward; dropout and drop path draw the same numbers each time."""
    torch.manual_seed(7)
    model.zero_grad()
    output = zoo.logits(name, model)(x)
    F.cross_entropy(output, torch.arange(len(x)) % zoo.CLASSES).backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def stem_input(model: nn.Module, layer: nn.Module, run) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    run()
    handle.remove()
    (x,) = seen
    return x


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_first_layer_is_found(name: str) -> None:
    model = zoo.build(name)
    stems = tract_hub.locate(model)
    assert tuple(stem.weight_name for stem in stems) == zoo.ALL[name].weights
    for stem in stems:
        assert model.get_submodule(stem.module_name) is stem.module
        assert model.get_parameter(stem.weight_name) is stem.module.weight
        assert stem.in_features == stem.module.weight[0].numel()


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_gradient_is_the_closed_form_in_float64(name: str) -> None:
    model = zoo.build(name, torch.double)
    x = zoo.images(name, torch.double)
    (stem,) = tract_hub.locate(model)
    _, ordinary = train_step(name, model, x)
    rows = layer_rows(
        stem.module, stem_input(model, stem.module, lambda: zoo.logits(name, model)(x))
    )
    _, gradients = train_step(name, tract_hub.enable(model, lam=LAM), x)
    expected = closed_form(ordinary[stem.weight_name], rows, LAM)
    assert relative_error(gradients[stem.weight_name], expected) < 1e-12


@pytest.mark.parametrize("name", zoo.ALL)
def test_every_other_gradient_and_the_output_are_bit_identical(name: str) -> None:
    model = zoo.build(name)
    x = zoo.images(name)
    output, ordinary = train_step(name, model, x)
    again, gradients = train_step(name, tract_hub.enable(model, lam=LAM), x)
    (stem,) = zoo.ALL[name].weights
    assert not torch.equal(gradients.pop(stem), ordinary.pop(stem))
    assert torch.equal(output, again)
    assert gradients.keys() == ordinary.keys()
    for key, gradient in gradients.items():
        assert torch.equal(gradient, ordinary[key]), key


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_gradient_matches_curvlinops_input_factor(name: str) -> None:
    """KFAC's forward-only operator maps V to V·A: then T·A + λT must be the ordinary gradient."""
    curvlinops = pytest.importorskip("curvlinops")
    model = zoo.build(name, torch.double)
    x = zoo.images(name, torch.double)
    y = torch.arange(len(x)) % zoo.CLASSES
    (stem,) = tract_hub.locate(model)
    weight = stem.module.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        factor = curvlinops.KFACLinearOperator(
            zoo.logits(name, model),
            nn.CrossEntropyLoss(),
            [weight],
            [(x, y)],
            fisher_type="forward-only",
            separate_weight_and_bias=True,
            check_deterministic=False,
        )
        _, ordinary = train_step(name, model, x)
        _, gradients = train_step(name, tract_hub.enable(model, lam=LAM), x)
        tract = gradients[stem.weight_name]
        tract_hub.disable(model)
        (back,) = factor @ [tract]
    assert relative_error(back + LAM * tract, ordinary[stem.weight_name]) < 1e-12


@pytest.mark.parametrize("name", zoo.ALL)
def test_the_gradient_matches_the_papers_own_formula(name: str) -> None:
    """The update of the pre-activations, solved for ΔW by least squares (section 3 of the paper).

    z* = z − η·b·∇z L, then ΔW minimises ‖z* − (W+ΔW)x‖² + λ·b·‖ΔW‖²; here η = 1 and −ΔW is what
    the optimizer gets for a gradient.
    """
    model = zoo.build(name, torch.double)
    x = zoo.images(name, torch.double)
    (stem,) = tract_hub.locate(model)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = stem.module.register_forward_hook(keep)
    _, ordinary = train_step(name, model, x)
    handle.remove()
    (z,) = seen
    features = z.grad.movedim(1, -1) if z.dim() == 4 else z.grad
    gradient_z = features.reshape(-1, len(stem.module.weight)).T  # (m, b)
    columns = layer_rows(
        stem.module, stem_input(model, stem.module, lambda: zoo.logits(name, model)(x))
    )[0].T  # (n, b)
    b, n = columns.shape[1], columns.shape[0]

    wanted = -b * gradient_z  # z* − z
    ridge = (LAM * b) ** 0.5 * torch.eye(n, dtype=torch.double)
    system = torch.cat([columns.T, ridge])
    target = torch.cat([wanted.T, torch.zeros(n, len(wanted), dtype=torch.double)])
    update = torch.linalg.lstsq(system, target, driver="gelsd").solution.T

    _, gradients = train_step(name, tract_hub.enable(model, lam=LAM), x)
    tract = gradients[stem.weight_name]
    assert relative_error(tract, -update.view_as(tract)) < 1e-11
    # The closed form as the paper prints it.
    weight_gradient = gradient_z @ columns.T
    inverse = torch.linalg.inv(columns @ columns.T / b + LAM * torch.eye(n, dtype=torch.double))
    assert relative_error(tract, (weight_gradient @ inverse).view_as(tract)) < 1e-12
    assert relative_error(weight_gradient.view_as(tract), ordinary[stem.weight_name]) < 1e-12
