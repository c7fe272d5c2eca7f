"""Changes to a model before a study: patch norms, weights from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import tract_hub
from tract_hub.errors import ModelError
from tract_hub.studies.models.patch_norm import add_patch_norm
from tract_hub.studies.models.weights import load_weights

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def vit(seed: int = 0, **options: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **VIT, **options)


@pytest.mark.parametrize("kind", ["patch", "dual"])
def test_every_patch_is_normalised_before_it_is_embedded(kind: str) -> None:
    model, plain = vit(), vit()
    add_patch_norm(model, kind, "a ViT")
    images = torch.rand(2, 3, 16, 16) * 200 + torch.rand(2, 3, 1, 1)
    patches = plain.patch_embed.proj.weight.flatten(1)
    rows = nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    rows = (rows - rows.mean(-1, keepdim=True)) / (
        rows.var(-1, keepdim=True, correction=0) + 1e-5
    ) ** 0.5
    embedded = rows @ patches.T + plain.patch_embed.proj.bias
    if kind == "dual":
        embedded = nn.functional.layer_norm(embedded, (16,))
    torch.testing.assert_close(model.patch_embed(images), embedded, rtol=1e-4, atol=1e-4)
    own = {name for name, _ in model.named_parameters() if "norm" in name and "patch_embed" in name}
    assert bool(own) == (kind == "dual")


def test_tract_s_rows_are_the_normalised_patches() -> None:
    model = vit()
    add_patch_norm(model, "dual", "a ViT")
    (stem,) = tract_hub.locate(model)
    assert stem.weight_name == "patch_embed.proj.conv.weight"
    assert "the pixels pass patch_embed.proj.norm" in " ".join(stem.notes)


def test_a_model_without_patches_has_no_patch_norm() -> None:
    with pytest.raises(ModelError, match="needs a timm ViT with patch_embed"):
        add_patch_norm(timm.create_model("test_resnet"), "patch", "test_resnet")


def test_weights_are_loaded_and_a_head_for_other_classes_stays_fresh(tmp_path: Path) -> None:
    source, model = vit(1, num_classes=10), vit(2, num_classes=3)
    head = model.head.weight.clone()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    said = load_weights(model, tmp_path / "w.safetensors", "a ViT")
    assert said == "weights from w.safetensors, but for head.bias, head.weight"
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)


def test_weights_of_another_model_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "pickle.pt").write_bytes(b"not a safetensors file")
    for name, says in {
        "w.safetensors": "is of another model than a ViT",
        "pickle.pt": "is no safetensors file",
        "missing": "is no safetensors file",
    }.items():
        with pytest.raises(ModelError, match=says):
            load_weights(model, tmp_path / name, "a ViT")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
