"""``enable``, ``disable`` and ``status`` as a user meets them."""

from __future__ import annotations

import copy
import functools
import io
import logging
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tract_hub
from tests import zoo
from tests.oracle import closed_form, conv_rows, relative_error


def snapshot(model: nn.Module) -> dict[str, tuple]:
    """Everything about each module that ``disable`` must give back."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            {k: tuple(v.items()) for k, v in module.__dict__.items() if "hooks" in k},
            {k: id(v) for k, v in module._parameters.items()},
            module.training,
            module.extra_repr(),
        )
        for name, module in model.named_modules()
    }


@pytest.fixture(params=["resnet18", "ViT"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def stem_gradient(name: str, model: nn.Module) -> Tensor:
    model.zero_grad()
    torch.manual_seed(3)
    zoo.logits(name, model)(zoo.images(name)).square().sum().backward()
    return model.get_parameter(zoo.ALL[name].weights[0]).grad.clone()


def test_enable_works_in_place_and_disable_gives_everything_back(name: str) -> None:
    model = zoo.build(name)
    ordinary = stem_gradient(name, model)
    model.register_forward_hook(lambda *_: None)  # a user's own, which must stay
    before, keys = snapshot(model), list(model.state_dict())
    assert tract_hub.enable(model) is model
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == [kind for kind, *_ in before.values()]
    assert not torch.equal(stem_gradient(name, model), ordinary)
    assert tract_hub.disable(model) is model
    assert snapshot(model) == before
    assert torch.equal(stem_gradient(name, model), ordinary)
    assert tract_hub.status(model) == ()


def test_status_and_repr_say_what_is_on(caplog: pytest.LogCaptureFixture) -> None:
    model = zoo.build("resnet18")
    assert tract_hub.status(model) == () and "no layer" in str(tract_hub.status(model))
    caplog.set_level(logging.INFO, "tract_hub")
    tract_hub.enable(model, lam=0.2)
    (line,) = caplog.messages
    for said in (line, repr(model), str(tract_hub.status(model))):
        assert "0.2" in said
    assert "conv1.weight" in line and "147 features" in line
    (state,) = tract_hub.status(model)
    assert (state.weight_name, state.module_name, state.lam) == ("conv1.weight", "conv1", 0.2)
    assert (state.scope, state.damping) == ("local", "absolute")
    assert (state.frozen, state.training, state.applied) == (False, True, False)
    stem_gradient("resnet18", model)
    model.eval().conv1.weight.requires_grad_(False)
    (state,) = tract_hub.status(model)
    assert (state.frozen, state.training, state.applied) == (True, False, True)


@pytest.mark.parametrize(
    "second", [{}, {"lam": 0.5}, {"scope": "global"}, {"damping": "relative"}, {"stems": ["fc"]}]
)
def test_enabling_again_replaces_the_settings_without_a_word(second: dict) -> None:
    model, fresh = tract_hub.enable(zoo.build("resnet18")), zoo.build("resnet18")
    tract_hub.enable(model, **second)
    tract_hub.enable(fresh, **second)
    assert tract_hub.status(model) == tract_hub.status(fresh)
    first = [stem_gradient("resnet18", each) for each in (model, fresh)]
    assert torch.equal(*first)


def test_what_others_still_hold_of_an_earlier_enable_is_not_reported() -> None:
    model = tract_hub.enable(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.1)
    earlier = model[0].forward
    model[0].forward = functools.wraps(earlier)(lambda x: earlier(x))
    assert [state.lam for state in tract_hub.status(model)] == [0.1]
    tract_hub.enable(model, 0.2, stems=["0"])
    assert [state.lam for state in tract_hub.status(model)] == [0.2]
    assert tract_hub.status(tract_hub.disable(model)) == ()


def two_stems() -> nn.Module:
    return timm.create_model("repvgg_a0", num_classes=3)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        ({"stem": 0.2}, (0.2, 0.2)),
        ({"stem": 0.2, "stem.conv_kxk": 0.3}, (0.2, 0.3)),
        ({"stem.conv_1x1.conv.weight": 0.5}, (0.5, 0.1)),
    ],
)
def test_each_first_layer_may_have_a_lambda_of_its_own(lam: dict, expected: tuple) -> None:
    model = tract_hub.enable(two_stems(), lam)
    assert tuple(state.lam for state in tract_hub.status(model)) == expected


def test_a_lambda_for_what_is_no_first_layer_is_refused() -> None:
    with pytest.raises(tract_hub.TractError, match=r"'stem.conv'.*stem.conv_1x1"):
        tract_hub.enable(two_stems(), {"stem.conv": 0.2})


@pytest.mark.parametrize("lam", [0, -0.1, math.nan, math.inf, "0.1", None, True, {"conv1": 0}])
def test_a_lambda_that_is_no_positive_number_is_refused(lam: object) -> None:
    model = zoo.build("resnet18")
    before = snapshot(model)
    with pytest.raises(ValueError, match="lam"):
        tract_hub.enable(model, lam=lam)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["l", "lambda_"])
def test_the_authors_names_lead_to_ours(name: str) -> None:
    with pytest.raises(TypeError, match=r"lam=0\.1"):
        tract_hub.enable(zoo.build("resnet18"), **{name: 0.1})
    with pytest.raises(AttributeError, match=r"tract_hub\.enable"):
        tract_hub.TrAct  # noqa: B018


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"scope": "rank"}, ValueError, "scope must be one of .*'local'"),
        ({"damping": "trace"}, ValueError, "damping must be one of"),
        ({"stems": ["conv1", "convl"]}, tract_hub.StemNotFoundError, r"no layer 'convl'.*'conv1'"),
        ({"stems": ["conv1", "bn1"]}, tract_hub.UnsupportedStemError, "BatchNorm2d"),
        ({"stems": "conv1"}, TypeError, "list"),
        ({"stems": []}, tract_hub.StemNotFoundError, "stems is empty: .* leave it out"),
    ],
)
def test_a_refusal_changes_nothing(wrong: dict, error: type, message: str) -> None:
    model = tract_hub.enable(zoo.build("resnet18"), lam=0.3)
    before, status = snapshot(model), tract_hub.status(model)
    with pytest.raises(error, match=message):
        tract_hub.enable(model, **wrong)
    assert snapshot(model) == before
    assert tract_hub.status(model) == status


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

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x.long())


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).mean() + self.conv(x).mean()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.to(torch.cfloat)).abs()


@pytest.mark.parametrize(
    ("cls", "error", "message"),
    [
        (Squashed, tract_hub.StemNotFoundError, r"Squashed.*'conv.weight'.*sigmoid.*stems="),
        (Looked, tract_hub.StemNotFoundError, r"Looked.*stems="),
        (Transposed, tract_hub.UnsupportedStemError, r"Transposed.*'up.weight'.*stems="),
        (Complex, tract_hub.UnsupportedStemError, r"Complex.*'conv.weight'.*real weights"),
    ],
)
def test_what_cannot_be_exact_is_refused_and_left_alone(cls, error, message: str) -> None:
    model = cls()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        tract_hub.enable(model)
    assert snapshot(model) == before


def test_a_complex_layer_that_is_named_is_refused() -> None:
    with pytest.raises(tract_hub.UnsupportedStemError, match=r"'conv' is complex.*real"):
        tract_hub.enable(Complex(), stems=["conv"])


def test_stems_can_be_named_by_layer_or_by_weight() -> None:
    found = tract_hub.enable(zoo.build("resnet18"))
    for entry in ("conv1", "conv1.weight"):
        named = tract_hub.enable(zoo.build("resnet18"), stems=[entry])
        assert [s.weight_name for s in tract_hub.status(named)] == ["conv1.weight"]
        assert torch.equal(stem_gradient("resnet18", named), stem_gradient("resnet18", found))


class Functional(nn.Module):
    """Applies weights in ways of its own."""

    def __init__(self, way) -> None:
        super().__init__()
        self.way = way
        self.w, self.conv = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x).square().mean()


WAYS = {
    "own": lambda m, x: F.conv2d(x, m.w),
    "own, standardised": lambda m, x: F.conv2d(x, m.w - m.w.mean()),
    "of a layer": lambda m, x: F.conv2d(x, m.conv.weight),
    "of a layer, and by it": lambda m, x: F.conv2d(x, m.conv.weight) - 2 * m.conv(x),
}


@pytest.mark.parametrize("way", [*WAYS, "parametrized"])
def test_a_schedule_by_the_names_that_status_shows_keeps_what_was_found(way: str) -> None:
    torch.manual_seed(0)
    model = Functional(WAYS.get(way, lambda m, x: m.conv(x)))
    if way == "parametrized":
        nn.utils.parametrizations.weight_norm(model.conv)
    x, gradients = torch.randn(4, 3, 8, 8), []
    for other in (0.2, 0.1):
        tract_hub.enable(model, other)
        names = [state.weight_name for state in tract_hub.status(model)]
        tract_hub.enable(model, 0.2, stems=names).zero_grad()
        model(x).backward()
        gradients.append(model.get_parameter(names[0]).grad.clone())
        assert [state.lam for state in tract_hub.status(model)] == [0.2]
    assert torch.equal(*gradients)
    tract_hub.enable(model, 0.2).zero_grad()
    model(x).backward()
    assert torch.equal(gradients[0], model.get_parameter(names[0]).grad)


def test_a_weight_of_no_layer_can_be_named() -> None:
    torch.manual_seed(0)
    model, x = Functional(WAYS["own"]), torch.randn(4, 3, 8, 8)
    gradients = []
    for stems in (None, ["w"]):
        tract_hub.enable(model, stems=stems).zero_grad()
        model(x).backward()
        gradients.append(model.w.grad.clone())
        tract_hub.disable(model)
    assert torch.equal(*gradients)
    with pytest.raises(tract_hub.StemNotFoundError, match=r"no layer 'conv\.bias'"):
        tract_hub.enable(model, stems=["conv.bias"])


def test_a_batch_norm_on_the_pixels_is_passed_with_a_warning() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    with pytest.warns(tract_hub.TractWarning, match=r"1\.weight.*0\.weight.*own input"):
        tract_hub.enable(model)
    assert [state.weight_name for state in tract_hub.status(model)] == ["1.weight"]


def test_a_frozen_twin_is_in_the_log_and_the_other_is_treated(caplog) -> None:
    """A momentum encoder is meant to be frozen: a warning would be an error here."""
    model = nn.ModuleDict({"query": nn.Conv2d(3, 4, 3), "key": nn.Conv2d(3, 4, 3)})
    model["key"].requires_grad_(False)
    with caplog.at_level("INFO", "tract_hub"):
        tract_hub.enable(model, stems=["query", "key"])
    assert sorted("frozen" in record.getMessage() for record in caplog.records) == [False, True]
    assert [state.frozen for state in tract_hub.status(model)] == [True, False]


def test_a_frozen_first_layer_warns_once_and_says_what_to_do() -> None:
    model = zoo.build("resnet18")
    model.conv1.requires_grad_(False)
    with pytest.warns(tract_hub.TractWarning, match=r"'conv1.weight' is frozen.*requires_grad_"):
        tract_hub.enable(model)
    zoo.logits("resnet18", model)(zoo.images("resnet18")).sum().backward()
    assert model.conv1.weight.grad is None


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


def shallow_copy(model: nn.Module) -> nn.Module:
    """Copy modules as learn2learn's ``clone`` does, with weights of their own."""
    twin = model.__new__(type(model))
    twin.__dict__ = model.__dict__ | {"_parameters": dict(model._parameters)}
    own = {name: p for name, p in twin._parameters.items() if p is not None}
    twin._parameters |= {name: nn.Parameter(2 * p.detach()) for name, p in own.items()}
    twin._modules = {name: shallow_copy(module) for name, module in model._modules.items()}
    return twin


@pytest.mark.parametrize("change", [tract_hub.disable, tract_hub.enable])
def test_a_shallow_copy_is_freed_of_the_original(change) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    expected = 2 * model(x)
    twin = shallow_copy(tract_hub.enable(model))
    assert not tract_hub.status(twin)
    change(twin)
    assert torch.allclose(twin(x), expected)
    assert len(tract_hub.status(twin)) == (change is tract_hub.enable)
    assert len(tract_hub.status(model)) == 1


def test_an_ema_copy_follows_the_enabled_model() -> None:
    from timm.utils import ModelEmaV3

    model = tract_hub.enable(zoo.build("resnet18"))
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.conv1.weight.zero_()
    ema.update(model)
    assert torch.allclose(ema.module.conv1.weight, zoo.build("resnet18").conv1.weight / 2)


def test_several_first_layers_are_all_treated() -> None:
    model, x = two_stems().double(), torch.randn(2, 3, 64, 64).double()
    stems = tract_hub.locate(model)
    assert [s.weight_name for s in stems] == [
        "stem.conv_1x1.conv.weight",
        "stem.conv_kxk.conv.weight",
    ]
    weights = [stem.module.weight for stem in stems]
    ordinary = torch.autograd.grad(model(x).square().sum(), weights)
    tract_hub.enable(model)(x).square().sum().backward()
    for stem, raw in zip(stems, ordinary, strict=True):
        layer = stem.module
        rows = conv_rows(x, raw, stride=layer.stride, padding=layer.padding)
        assert relative_error(layer.weight.grad, closed_form(raw, rows, 0.1)) < 1e-11


class Towers(nn.Module):
    """Two models on the same images."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


def test_parts_may_be_enabled_one_by_one_and_then_the_whole() -> None:
    model = Towers()
    tract_hub.enable(model.one, 0.1)
    tract_hub.enable(model.two, 0.5, scope="global")
    assert [(s.lam, s.scope) for s in tract_hub.status(model)] == [(0.1, "local"), (0.5, "global")]
    tract_hub.enable(model, 0.2)
    assert [(s.lam, s.scope) for s in tract_hub.status(model)] == [(0.2, "local")] * 2
    tract_hub.enable(model.two, 0.3)
    assert [s.lam for s in tract_hub.status(model)] == [0.2, 0.3]
    tract_hub.disable(model.one)
    assert [s.weight_name for s in tract_hub.status(model)] == ["two.0.weight"]
    model(torch.randn(2, 3, 8, 8)).sum().backward()  # warns of nothing
