"""First layers of timm models, named as data: one of each distinct structure, every variant."""

import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import reparameterize_model

import tract_hub
from tests.oracle import closed_form, relative_error
from tract_hub.locator.zoos.timm import declared_stems

ONE_OF_EACH = {
    "beit_base_patch16_224": "patch_embed.proj",
    "coat_tiny": "patch_embed1.proj",
    "convnextv2_atto": "stem.0",
    "davit_tiny": "stem.conv",  # pads outside of its layer
    "dm_nfnet_f0": "stem.conv1",  # scaled, standardised weight
    "dpn68": "features.conv1_1.conv",  # checkpoints its stem
    "eva02_tiny_patch14_224": "patch_embed.proj",
    "hardcorenas_a": "conv_stem",
    "inception_next_tiny": "stem.0",
    "mixnet_s": "conv_stem",
    "naflexvit_base_patch16_gap": "embeds.proj",  # a Linear on patches
    "resnet26d": "conv1.0",
    "resnetv2_50x1_bit": "stem.conv",  # standardised weight
    "sequencer2d_s": "stem.proj",  # recurrent
    "swin_tiny_patch4_window7_224": "patch_embed.proj",
    "tf_efficientnet_b0": "conv_stem",  # pads inside of its forward
    "tnt_s_legacy_patch16_224": "pixel_embed.proj",  # its layer sees patches as images
    "tresnet_m": "body.conv1.conv",  # space to depth first
    "vit_tiny_r_s16_p8_224": "patch_embed.backbone.conv",
    "xcit_nano_12_p16_224": "patch_embed.proj.0.0",
}

SEVERAL = {
    "repvgg_a0": ["stem.conv_1x1.conv", "stem.conv_kxk.conv"],
    "mobileone_s1": ["stem.conv_kxk.0.conv", "stem.conv_scale.conv"],
    "fastvit_t8": ["stem.0.conv_kxk.0.conv", "stem.0.conv_scale.conv"],
    "crossvit_9_240": ["patch_embed.0.proj", "patch_embed.1.proj"],
    "csatv2": ["stem_dct.conv_cb", "stem_dct.conv_cr", "stem_dct.conv_y"],
}


def build(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return timm.create_model(name, **options)
        except NotImplementedError:  # timm below 1.0.30 computes weights while it builds csatv2
            return timm.create_model(name, **options)


def found(model, *inputs):
    return [stem.weight_name.removesuffix(".weight") for stem in tract_hub.locate(model, *inputs)]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_first_layer(name) -> None:
    model = build(name)
    assert found(model) == [ONE_OF_EACH[name]]
    assert declared_stems(model) == {f"{ONE_OF_EACH[name]}.weight"}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_first_layers(name) -> None:
    assert found(build(name)) == SEVERAL[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "conv1"),
        ("vit_tiny_patch16_224", "model.patch_embed.proj"),
        ("efficientnet_b0", "conv_stem"),
        ("convnext_atto", "stem_0"),
    ],
)
def test_features_only(name, expected) -> None:
    assert found(build(name, features_only=True)) == [expected]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("vit_tiny_patch16_224", "patch_embed.proj"),
        ("resnet18", "conv1"),
        ("convnext_atto", "stem.0"),
    ],
)
def test_a_frozen_stem_before_layers_that_learn(name, stem) -> None:
    model = build(name)
    model.get_submodule(stem).requires_grad_(False)
    assert found(model) == [stem]


def test_use_naflex() -> None:
    model = build("vit_tiny_patch16_224", use_naflex=True)
    assert found(model) == ["embeds.proj"]
    assert declared_stems(model) == set()  # it declares a layer that it does not have


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s1", "fastvit_t8"])
def test_joined_branches_are_one_layer(name) -> None:
    joined = reparameterize_model(timm.create_model(name))
    assert found(joined) == [f"{SEVERAL[name][0].rpartition('.conv_')[0]}.reparam_conv"]


@pytest.mark.parametrize("channels", [1, 4, 7])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "tresnet_m", "repvgg_a0"])
def test_other_channels(name, channels) -> None:
    assert found(build(name, in_chans=channels)) == found(build(name))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 96}),
        ("vit_tiny_patch16_224", {"img_size": (64, 128)}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("swin_tiny_patch4_window7_224", {"img_size": 448}),
        ("gcvit_xxtiny", {"img_size": 192}),  # keeps its size nowhere
        ("efficientformerv2_s0", {"img_size": 192}),
        ("efficientformerv2_s0", {"img_size": 288}),  # no usual size: its own reshape tells
    ],
)
def test_other_sizes(name, options) -> None:
    assert found(build(name, **options)) == found(build(name))


def naflex_batch(*patch):
    coordinates = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    return {
        "patches": torch.zeros(2, 12, *patch),
        "patch_coord": coordinates.expand(2, -1, -1).clone(),
        "patch_valid": torch.ones(2, 12, dtype=torch.bool),
    }


@pytest.mark.parametrize("patch", [(768,), (16, 16, 3)])
def test_patches_of_naflex_as_a_dict(patch) -> None:
    assert found(build("naflexvit_base_patch16_gap"), naflex_batch(*patch)) == ["embeds.proj"]


def test_resampled_patch_weight_is_derived() -> None:
    model = build("naflexvit_base_patch16_gap", enable_patch_interpolator=True)
    (stem,) = tract_hub.locate(model, naflex_batch(8, 8, 3))
    assert stem.weight_name == "embeds.proj.weight"
    assert stem.derived
    assert stem.in_features == 192


def test_resampled_patch_weight_is_corrected_without_being_told(monkeypatch) -> None:
    torch.manual_seed(0)
    settings = {"enable_patch_interpolator": True, "num_classes": 3, "depth": 1}
    model = timm.create_model("naflexvit_base_patch16_gap", **settings).double()
    torch.nn.init.normal_(model.head.weight)
    batch = naflex_batch(8, 8, 3)
    batch["patches"] = torch.randn(2, 12, 8, 8, 3, dtype=torch.double)
    weight = model.embeds.proj.weight
    calls = []

    def spy(x, used, bias=None):
        calls.append((x, used))
        return torch._C._nn.linear(x, used, bias)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", spy)
        loss = model(batch).square().sum()
    x, used = calls[0]
    (raw,) = torch.autograd.grad(loss, used, retain_graph=True)
    corrected = closed_form(raw, [x.reshape(-1, x.shape[-1])], 0.1)
    (expected,) = torch.autograd.grad(used, weight, corrected)

    tract_hub.enable(model)
    assert [state.weight_name for state in tract_hub.status(model)] == ["embeds.proj.weight"]
    model(batch).square().sum().backward()
    assert relative_error(weight.grad, expected) < 1e-11


def test_trace_wins_over_another_declaration_and_says_so() -> None:
    model = build("resnet18")
    model.pretrained_cfg = {**model.pretrained_cfg, "first_conv": "layer1.0.conv1"}
    with pytest.warns(tract_hub.TractWarning, match=r"layer1\.0\.conv1\.weight.*'?conv1\.weight"):
        assert found(model) == ["conv1"]


def test_declaration_of_a_layer_that_is_gone_is_not_spoken_of() -> None:
    model = build("resnet18")
    model.pretrained_cfg = {**model.pretrained_cfg, "first_conv": "stem.conv"}
    assert found(model) == ["conv1"]  # a TractWarning would be an error here


AUDIT = Path(__file__).parents[2] / "docs" / "audit" / "timm.json"


@pytest.mark.audit
@pytest.mark.timeout(7200)
def test_every_default_model() -> None:
    from tract_hub.studies.audit import audit_model
    from tract_hub.studies.zoos import models_of

    names = [name for name in models_of("timm") if "[" not in name]
    records = [audit_model("timm", name) for name in names]
    results = [record["result"] for record in records]
    assert set(results) == {"exact", "multiple"}
    known = {r["name"]: r for r in json.loads(AUDIT.read_text(encoding="utf-8"))["models"]}
    assert [r for r in records if known.get(r["name"], r) != r] == []
