"""Patch normalisation and DualPatchNorm, the rivals of TrAct that change the model."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tract_hub.errors import ModelError


class PatchNorm(nn.Module):
    """LayerNorm over all pixels and channels of each patch.

    Args:
        channels: of the images.
        patch: height and width of a patch in pixels.
        affine: whether it scales and shifts by weights of its own.

    """

    def __init__(self, channels: int, patch: tuple[int, int], affine: bool) -> None:
        super().__init__()
        self.patch = patch
        features = channels * patch[0] * patch[1]
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None

    def forward(self, images: Tensor) -> Tensor:
        """Return images, batch × channels × height × width, with each patch normalised."""
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        normed = F.layer_norm(patches, patches.shape[-1:], self.weight, self.bias)
        height, width = images.shape[-2:]
        return F.fold(normed.transpose(1, 2), (height, width), self.patch, stride=self.patch)


def add_patch_norm(model: nn.Module, kind: str, name: str) -> str:
    """Normalise the patches of a timm ViT, in place; no other weight changes.

    Args:
        model: has ``patch_embed.proj``, a Conv2d whose kernel is its stride.
        kind: ``"patch"``: zero mean and unit deviation for each patch, without weights;
            ``"dual"``: DualPatchNorm (Kumar et al. 2023), a LayerNorm before and after.
        name: for messages.

    Returns:
        What was done, in words.

    Raises:
        ModelError: the model has no such patch embedding.

    """
    embedding: Any = getattr(model, "patch_embed", None)
    proj = getattr(embedding, "proj", None)
    if not isinstance(proj, nn.Conv2d) or proj.kernel_size != proj.stride:
        raise ModelError(
            f"--patch-norm needs a timm ViT with patch_embed.proj, which {name} does not have: "
            "pass --patch-norm none"
        )
    height, width = proj.kernel_size
    norm = PatchNorm(proj.in_channels, (height, width), affine=kind == "dual")
    embedding.proj = nn.Sequential(OrderedDict(norm=norm, conv=proj))
    if kind == "dual":
        embedding.norm = nn.LayerNorm(proj.out_channels)
    return {"patch": "patches standardised", "dual": "DualPatchNorm"}[kind]
