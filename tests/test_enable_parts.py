"""``enable`` on a part of a model, and then on the whole; on layers that share a weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tract_hub
from tests.oracle import closed_form, conv_rows, relative_error
from tests.test_enable import snapshot


def tower() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).double()


class Towers(nn.Module):
    """Two models on the same images, each enabled by itself."""

    def __init__(self, lams: tuple[float, float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (tract_hub.enable(tower(), lam=lam) for lam in lams)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x.flip(-1).cumsum(-1))


def test_parts_that_were_enabled_one_by_one_keep_their_own_rows_under_another_scope() -> None:
    model = Towers((0.1, 0.1))
    images = torch.randn(5, 3, 8, 8, dtype=torch.double)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(images).square().sum().backward()
        return [part[0].weight.grad.clone() for part in (model.one, model.two)]

    before = gradients()
    with pytest.warns(tract_hub.TractWarning, match="scope changed"):
        tract_hub.enable(model, scope="global")
    for got, expected in zip(gradients(), before, strict=True):
        assert relative_error(got, expected) < 1e-12


def test_a_part_that_alone_has_another_lambda_is_changed_too_and_named() -> None:
    model = Towers((0.1, 0.5))
    with pytest.warns(tract_hub.TractWarning, match=r"on two\.0\.weight: λ changed from 0\.5 to"):
        tract_hub.enable(model, lam=0.1)
    assert [state.lam for state in tract_hub.status(model)] == [0.1, 0.1]


def test_a_part_of_an_enabled_model_gets_no_scope_of_its_own() -> None:
    model = nn.Sequential(tower(), nn.Linear(2, 2).double())
    tract_hub.enable(model, example_inputs=torch.randn(2, 3, 8, 8, dtype=torch.double))
    with pytest.raises(tract_hub.TractError, match=r"0\.weight was enabled on a model that this"):
        tract_hub.enable(model[0], lam=0.3, scope="global")
    assert [(state.lam, state.scope) for state in tract_hub.status(model)] == [(0.1, "local")]


class TwoStems(nn.Module):
    """A backbone, and a layer of its own that reads the pixels too."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.side = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x) + self.side(x)


def test_a_whole_with_more_first_layers_than_its_enabled_part_is_refused() -> None:
    model = TwoStems()
    tract_hub.enable(model.backbone)
    before = snapshot(model)
    with pytest.raises(tract_hub.TractError, match=r"not backbone.0.weight, side.weight.*disable"):
        tract_hub.enable(model)
    assert snapshot(model) == before
    tract_hub.enable(tract_hub.disable(model))
    assert len(tract_hub.status(model)) == 2


def test_a_whole_with_the_first_layer_of_its_enabled_part_is_enabled() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.ReLU())
    tract_hub.enable(model[0])
    before = snapshot(model)
    tract_hub.enable(model)
    assert snapshot(model) == before


def test_a_layer_put_in_anothers_place_is_enabled_anew() -> None:
    model = tract_hub.enable(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    model[0] = nn.Conv2d(3, 4, 5)
    assert tract_hub.status(model) == ()
    tract_hub.enable(model)
    assert len(model._forward_pre_hooks) == 1
    model(torch.randn(2, 3, 8, 8))  # warns of no layer that is gone
    two = tract_hub.enable(TwoStems())
    two.side = nn.Conv2d(3, 4, 3)
    with pytest.raises(tract_hub.TractError, match="disable"):
        tract_hub.enable(two)


def test_a_layer_that_was_added_since_is_not_passed_over() -> None:
    peft = pytest.importorskip("peft")
    model = tract_hub.enable(TwoStems())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["side"]))
    with pytest.raises(tract_hub.TractError, match=r"lora_A.*disable"):
        tract_hub.enable(adapted)


class SharedWeight(nn.Module):
    """Two layers of one weight."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), other
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x).mean() + self.right(x[..., ::2, ::2] * 3).square().mean()


@pytest.mark.parametrize("stems", [["left"], ["right"], ["left", "right"]])
def test_a_named_layer_whose_weight_another_has_shares_its_rows(stems: list[str]) -> None:
    torch.manual_seed(0)
    model, x = SharedWeight(nn.Conv2d(3, 4, 3)).double(), torch.randn(4, 3, 9, 9).double()
    (raw,) = torch.autograd.grad(model(x), model.left.weight)
    rows = [torch.cat([conv_rows(x, raw)[0], conv_rows(x[..., ::2, ::2] * 3, raw)[0]])]
    tract_hub.enable(model, stems=stems)(x).backward()
    assert relative_error(model.left.weight.grad, closed_form(raw, rows, 0.1)) < 1e-11


def test_a_named_layer_whose_weight_something_else_has_is_refused() -> None:
    model = SharedWeight(nn.ConvTranspose2d(4, 3, 3))
    before = snapshot(model)
    with pytest.raises(tract_hub.UnsupportedStemError, match="'right' too"):
        tract_hub.enable(model, stems=["left"])
    assert snapshot(model) == before
