"""The models of the benchmark, and photographs for them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tract_hub.errors import SettingsError
from tract_hub.studies.images.photographs import load_photographs
from tract_hub.studies.models.stems import adapt_stem


@dataclass(frozen=True)
class Case:
    """One model, and the batch of its training step.

    Attributes:
        model: name of a timm model.
        size: side of the square images, in pixels.
        batch: images in a step.
        small_stem: whether the stem is 3 × 3 with stride 1, as for 32 × 32 images.
        arguments: for ``timm.create_model``.

    """

    model: str
    size: int
    batch: int
    small_stem: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Return the model in training mode, with weights of its own making."""
        import timm

        model: nn.Module = timm.create_model(self.model, **self.arguments)
        if self.small_stem:
            adapt_stem(model, self.model)
        return model.train()


_PAPERS_VIT = {
    "img_size": 32, "patch_size": 4, "embed_dim": 384, "depth": 7, "num_heads": 12,
    "num_classes": 10,
}  # fmt: skip

CASES = {
    "cpu": {
        "resnet18-32": Case("resnet18", 32, 64, small_stem=True),
        "resnet18": Case("resnet18", 224, 8),
        "mobilenetv3-small": Case("mobilenetv3_small_100", 224, 16),
        "convnext-atto": Case("convnext_atto", 224, 8),
        "vit-small": Case("vit_small_patch16_224", 224, 8),
        "vit-tiny": Case("vit_tiny_patch16_224", 224, 16),
    },
    "cuda": {
        "resnet50": Case("resnet50", 224, 256),
        "vit-small": Case("vit_small_patch16_224", 224, 256),
        "vit-base": Case("vit_base_patch16_224", 224, 256),
        "cifar-vit": Case("vit_small_patch16_224", 32, 128, arguments=_PAPERS_VIT),
    },
}


def chosen(device: str, names: str) -> dict[str, Case]:
    """Return cases of a kind of device by their names, separated by commas; all for none.

    Raises:
        SettingsError: there is no such case.

    """
    cases = CASES["cpu" if device == "cpu" else "cuda"]
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(cases)
    for name in wanted:
        if name not in cases:
            raise SettingsError(f"there is no case {name!r}; there is {', '.join(cases)}")
    return {name: cases[name] for name in wanted}


@functools.lru_cache(maxsize=1)  # all arms of a case have the same
def photographs(size: int, batch: int) -> Tensor:
    """Crops of scikit-learn's two photographs, standardised: (batch, 3, size, size), float32.

    Noise would not do: neighbouring pixels are alike, and what a Gram matrix then needs in
    precision is part of the cost.
    """
    images = load_photographs()
    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(batch):
        image = images[i % len(images)]
        limits = [extent - size + 1 for extent in image.shape[1:]]
        y, x = (int(torch.randint(limit, (), generator=generator)) for limit in limits)
        crops.append(image[:, y : y + size, x : x + size])
    pixels = torch.stack(crops)
    mean = pixels.mean((0, 2, 3), keepdim=True)
    return (pixels - mean) / pixels.std((0, 2, 3), keepdim=True)
