"""``enable``, ``disable`` and ``status`` as a user meets them."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

import tract_hub
from tests import zoo


def snapshot(model: nn.Module) -> dict[str, tuple]:
    """Everything about each module that ``disable`` must give back."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            {k: tuple(v.items()) for k, v in module.__dict__.items() if "hooks" in k},
            {k: id(v) for k, v in module._parameters.items()},
            module.training,
        )
        for name, module in model.named_modules()
    }


@pytest.fixture(params=["resnet18", "vit_tiny", "ViT", "Swin"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def stem_gradient(name: str, model: nn.Module, batch: int = 3) -> Tensor:
    model.zero_grad()
    torch.manual_seed(3)
    zoo.logits(name, model)(zoo.images(name, batch=batch)).square().sum().backward()
    return model.get_parameter(zoo.ALL[name].weights[0]).grad.clone()


def test_enable_works_in_place_and_keeps_the_model_what_it_was(name: str) -> None:
    model = zoo.build(name)
    before = {k: id(p) for k, p in model.named_parameters()}
    keys, cls = list(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
    assert tract_hub.enable(model) is model
    assert {k: id(p) for k, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert {n: type(m) for n, m in model.named_modules()} == cls


def test_disable_gives_everything_back(name: str) -> None:
    model = zoo.build(name)
    ordinary = stem_gradient(name, model)
    hook = model.register_forward_hook(lambda *_: None)  # a user's own, which must stay
    before = snapshot(model)
    tract_hub.enable(model)
    assert snapshot(model) != before
    assert not torch.equal(stem_gradient(name, model), ordinary)
    assert tract_hub.disable(model) is model
    assert snapshot(model) == before
    assert torch.equal(stem_gradient(name, model), ordinary)
    assert tract_hub.status(model) == ()
    hook.remove()


def test_status_says_what_is_on() -> None:
    model = zoo.build("resnet18")
    assert tract_hub.status(model) == ()
    tract_hub.enable(model, lam=0.2)
    (state,) = tract_hub.status(model)
    assert (state.weight_name, state.lam, state.scope) == ("conv1.weight", 0.2, "local")
    assert (state.frozen, state.training) == (False, True)
    model.eval().conv1.weight.requires_grad_(False)
    (state,) = tract_hub.status(model)
    assert (state.frozen, state.training) == (True, False)


def test_enabling_twice_is_enabling_once(name: str) -> None:
    model = tract_hub.enable(zoo.build(name))
    gradient, before = stem_gradient(name, model), snapshot(model)
    tract_hub.enable(model)
    assert snapshot(model) == before
    assert torch.equal(stem_gradient(name, model), gradient)


def test_a_second_lambda_takes_the_place_of_the_first_and_says_so(name: str) -> None:
    model = tract_hub.enable(zoo.build(name), lam=0.1)
    with pytest.warns(tract_hub.TractWarning, match=r"λ changed from 0\.1 to 0\.5"):
        tract_hub.enable(model, lam=0.5)
    assert [state.lam for state in tract_hub.status(model)] == [0.5]
    fresh = tract_hub.enable(zoo.build(name), lam=0.5)
    assert torch.equal(stem_gradient(name, model), stem_gradient(name, fresh))


def test_a_second_scope_takes_the_place_of_the_first_and_says_so(name: str) -> None:
    model = tract_hub.enable(zoo.build(name))
    for old, new in (("local", "global"), ("global", "rank")):
        before = snapshot(model)
        with pytest.warns(tract_hub.TractWarning, match=f"scope changed from '{old}' to '{new}'"):
            tract_hub.enable(model, scope=new)
        assert [state.scope for state in tract_hub.status(model)] == [new]
        assert snapshot(model) == before  # the same hooks
        first, second = stem_gradient(name, model), stem_gradient(name, model)
        assert torch.equal(first, second)
        tract_hub.enable(model, scope=new)  # the same once more: not a word


def test_other_stems_on_an_enabled_model_are_refused() -> None:
    model = tract_hub.enable(zoo.build("resnet18"))
    with pytest.raises(tract_hub.TractError, match="disable"):
        tract_hub.enable(model, stems=["fc"])
    tract_hub.enable(model, stems=["conv1"])  # the same one


@pytest.mark.parametrize("lam", [0, -0.1, math.nan, math.inf, "0.1", None, True])
def test_a_lambda_that_is_no_positive_number_is_refused(lam: object) -> None:
    model = zoo.build("resnet18")
    before = snapshot(model)
    with pytest.raises(ValueError, match="lam"):
        tract_hub.enable(model, lam=lam)
    assert snapshot(model) == before


def test_a_scope_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="scope"):
        tract_hub.enable(zoo.build("resnet18"), scope="world")


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="Module"):
        tract_hub.enable("resnet18")


class Refused:
    """Models without a first layer that could be treated, and what the refusal must say."""

    class Squashed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.sigmoid(x))

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(256, 8)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x.long())

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 3)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x).mean() + self.conv(x).mean()

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.conv(x)))

    cases = (
        (Squashed, tract_hub.StemNotFoundError, r"Squashed.*'conv.weight'.*sigmoid.*stems="),
        (Looked, tract_hub.StemNotFoundError, r"Looked.*stems="),
        (Transposed, tract_hub.UnsupportedStemError, r"Transposed.*'up.weight'.*stems="),
        (Recurrent, tract_hub.UnsupportedStemError, r"Recurrent.*'conv.weight'.*stems="),
    )


@pytest.mark.parametrize(("cls", "error", "message"), Refused.cases)
def test_what_cannot_be_exact_is_refused_and_left_alone(cls, error, message: str) -> None:
    model = cls()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        tract_hub.enable(model)
    assert snapshot(model) == before


def test_a_failure_half_way_changes_nothing() -> None:
    model = zoo.build("resnet18")
    before = snapshot(model)
    with pytest.raises(tract_hub.StemNotFoundError, match=r"no layer 'convl'.*'conv1'"):
        tract_hub.enable(model, stems=["conv1", "convl"])
    with pytest.raises(tract_hub.UnsupportedStemError, match="BatchNorm2d"):
        tract_hub.enable(model, stems=["conv1", "bn1"])
    with pytest.raises(TypeError, match="list"):
        tract_hub.enable(model, stems="conv1")
    with pytest.raises(tract_hub.StemNotFoundError, match=r"stems is empty: .* leave it out"):
        tract_hub.enable(model, stems=[])
    assert snapshot(model) == before


@pytest.mark.parametrize("entry", ["conv1", "conv1.weight"])
def test_stems_can_be_named_by_layer_or_by_weight(entry: str) -> None:
    named = tract_hub.enable(zoo.build("resnet18"), stems=[entry])
    found = tract_hub.enable(zoo.build("resnet18"))
    assert tract_hub.status(named) == tract_hub.status(found)
    assert torch.equal(stem_gradient("resnet18", named), stem_gradient("resnet18", found))


def test_a_batch_norm_on_the_pixels_is_passed_with_a_warning() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    with pytest.warns(tract_hub.TractWarning, match=r"1\.weight.*0\.weight.*own input"):
        tract_hub.enable(model)
    assert [state.weight_name for state in tract_hub.status(model)] == ["1.weight"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_an_enabled_model_are_enabled(name: str, how: str) -> None:
    model = tract_hub.enable(zoo.build(name), lam=0.2)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert tract_hub.status(twin) == tract_hub.status(model)
    assert torch.equal(stem_gradient(name, twin), stem_gradient(name, model))
    tract_hub.disable(twin)
    assert tract_hub.status(model) != ()


def test_weights_go_to_and_from_the_ordinary_model(name: str) -> None:
    model, ordinary = tract_hub.enable(zoo.build(name)), zoo.build(name)
    ordinary.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(ordinary.state_dict(), strict=True)


def test_save_pretrained_writes_the_ordinary_checkpoint(tmp_path) -> None:
    model = tract_hub.enable(zoo.build("ViT"))
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert tract_hub.status(again) == ()
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_an_ema_copy_follows_the_enabled_model() -> None:
    from timm.utils import ModelEmaV3

    model = tract_hub.enable(zoo.build("resnet18"))
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.conv1.weight.zero_()
    ema.update(model)
    assert torch.allclose(ema.module.conv1.weight, zoo.build("resnet18").conv1.weight / 2)


def test_several_first_layers_are_all_treated() -> None:
    model = timm.create_model("repvgg_a0", num_classes=3)
    stems = tract_hub.locate(model)
    assert [s.weight_name for s in stems] == [
        "stem.conv_1x1.conv.weight",
        "stem.conv_kxk.conv.weight",
    ]
    x = torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    ordinary = {s.weight_name: s.module.weight.grad.clone() for s in stems}
    model.zero_grad()
    tract_hub.enable(model)(x).square().sum().backward()
    for stem in stems:
        assert not torch.allclose(stem.module.weight.grad, ordinary[stem.weight_name])


def test_hooks_stand_in_their_table_in_the_order_in_which_they_run() -> None:
    """The compiler of torch 2.11 looks them up by where they were put in."""
    layer, order = nn.Conv2d(3, 4, 3), []
    layer.register_forward_pre_hook(lambda module, inputs: order.append("the user's"))
    tract_hub.enable(layer, stems=[""])
    table = layer._forward_pre_hooks
    assert list(dict.keys(table)) == list(table)
    assert len(table) == 3
    assert [hasattr(hook, "__self__") for hook in table.values()] == [True, True, False]
    layer(torch.randn(1, 3, 8, 8))
    assert order == ["the user's"]
