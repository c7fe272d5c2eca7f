"""Small published models, and an input for each, for tests that run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A model to build, the first layers it has, and the size of its images."""

    build: Callable[[], nn.Module]
    weights: tuple[str, ...]
    size: int


class Logits(nn.Module):
    """A Hugging Face classifier that takes and returns tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def _timm(name: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **settings)


def _short_mixer() -> nn.Module:
    model = timm.create_model("mixer_b16_224", num_classes=CLASSES, img_size=64)
    model.blocks = model.blocks[:1]
    return model


def _huggingface(name: str, **settings: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **settings)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return build


_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}

TIMM = {
    "resnet18": Case(_timm("resnet18"), ("conv1.weight",), 32),
    "vit_tiny": Case(
        _timm("vit_tiny_patch16_224", depth=2, img_size=64), ("patch_embed.proj.weight",), 64
    ),
    "convnext_atto": Case(_timm("convnext_atto", depths=(1, 1, 1, 1)), ("stem.0.weight",), 32),
    "swin_tiny": Case(
        _timm("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(3, 6)),
        ("patch_embed.proj.weight",),
        56,
    ),
    "mixer_b16": Case(_short_mixer, ("stem.proj.weight",), 64),
}

HUGGINGFACE = {
    "ViT": Case(
        _huggingface("ViT", image_size=32, patch_size=8, **_VIT),
        ("vit.embeddings.patch_embeddings.projection.weight",),
        32,
    ),
    "ConvNext": Case(
        _huggingface("ConvNext", num_stages=2, image_size=32, **_STAGES),
        ("convnext.embeddings.patch_embeddings.weight",),
        32,
    ),
    "ResNet": Case(
        _huggingface("ResNet", embedding_size=8, **_STAGES),
        ("resnet.embedder.embedder.convolution.weight",),
        32,
    ),
    "Swin": Case(
        _huggingface(
            "Swin", image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
        ("swin.embeddings.patch_embeddings.projection.weight",),
        32,
    ),
}

ALL = {**TIMM, **HUGGINGFACE}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a model of ``ALL`` with every weight random, the classifier's too."""
    torch.manual_seed(0)
    model = ALL[name].build()
    for parameter in model.parameters():
        if not parameter.any():  # a classifier that starts at 0 sends no gradient down
            nn.init.normal_(parameter, std=0.02)
    return model.to(dtype).train()


def images(name: str, dtype: torch.dtype = torch.float32, batch: int = 3) -> Tensor:
    """Make standardised images of a model's size."""
    size = ALL[name].size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def logits(name: str, model: nn.Module) -> nn.Module:
    """Give any model of ``ALL`` the interface of tensors in, logits out."""
    return Logits(model) if name in HUGGINGFACE else model
