"""The stem of a model, adapted to small images."""

from __future__ import annotations

from typing import Any

from torch import nn

from tract_hub.errors import ModelError


def adapt_stem(model: nn.Module, name: str) -> str:
    """Make the first convolution 3 × 3 with stride 1, as the paper does for 32 × 32 images.

    Everything after it stays, a max-pool included. The new weights are drawn as timm's ResNet
    draws them (He, fan-out).

    Args:
        model: a timm model with one strided, overlapping Conv2d as its stem; changed in place.
        name: for messages.

    Returns:
        What was done, in words.

    Raises:
        ModelError: the model has no such stem.

    """
    declared = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    stem = _module(model, declared) if isinstance(declared, str) else None
    if not isinstance(stem, nn.Conv2d) or min(stem.kernel_size) <= max(stem.stride):
        raise ModelError(
            f"--stem cifar replaces one overlapping first convolution, which {name} does not "
            "have; use --stem published"
        )
    adapted = nn.Conv2d(
        stem.in_channels, stem.out_channels, 3, stride=1, padding=1, bias=stem.bias is not None
    )
    nn.init.kaiming_normal_(adapted.weight, mode="fan_out", nonlinearity="relu")
    parent, _, leaf = str(declared).rpartition(".")
    setattr(model.get_submodule(parent), leaf, adapted)
    return f"stem {declared} adapted: {_geometry(stem)} → {_geometry(adapted)}"


def _module(model: nn.Module, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _geometry(conv: nn.Conv2d) -> str:
    height, width = conv.kernel_size
    return f"{height} × {width} stride {conv.stride[0]}"
