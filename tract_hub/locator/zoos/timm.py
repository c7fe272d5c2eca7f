"""timm: a model's configuration says what its images look like, and where they go first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tract_hub.locator.zoos.examples import Example, declared_size, image, images_example


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield example inputs for a timm model, of the size that it was built for.

    The configuration is the pretrained model's and outdated where the size or the channels were
    overridden; others are found by trying.
    """
    channels, height, width = _configuration(model).get("input_size", (3, 224, 224))
    channels = getattr(model, "in_chans", None) or channels
    size = declared_size(model) or (height, width)
    further = tuple(_patches_of_another_size(model))
    yield replace(images_example(model, 2, channels, *size), also=further)


def _patches_of_another_size(model: nn.Module) -> Iterator[Example]:
    """Yield a batch for which a NaFlex model resamples its patch embedding, if it can."""
    embeds: Any = getattr(model, "embeds", None)
    # What timm calls ``supports_patch_interpolation``, though not yet in 1.0.24:
    interpolates = getattr(embeds, "patch_interpolator", None) is not None
    if not (interpolates and embeds.is_linear and embeds.norm_input is None):
        return
    height, width = embeds.patch_size
    channels = embeds.proj.in_features // (height * width)
    patches = image(model, 2, 4, height * 2, width * 2, channels)
    batch = {
        "patches": patches,
        "patch_coord": torch.cartesian_prod(torch.arange(2), torch.arange(2)).repeat(2, 1, 1),
        "patch_valid": torch.ones(2, 4, dtype=torch.bool),
    }
    yield Example(args=(batch,), pixels=(patches,))


def declared_stems(model: nn.Module) -> set[str]:
    """Return the weights of the first layers that timm declares.

    Empty where the model declares none, or one that it does not have: ``features_only``,
    ``use_naflex`` and reparametrisation rename layers and leave the declaration as it was.
    """
    declared = _configuration(model).get("first_conv") or ()
    names = (declared,) if isinstance(declared, str) else tuple(declared)
    weights = {f"{name}.weight" for name in names}
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return weights if weights <= present else set()


def _configuration(model: nn.Module) -> dict[str, Any]:
    found = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return found if isinstance(found, dict) else {}
