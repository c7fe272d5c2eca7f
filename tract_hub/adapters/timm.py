"""timm: a model knows the size of its input."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tract_hub.adapters.examples import Example, image_example


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield example inputs for a timm model of its configured size and channels."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    embedding = getattr(model, "patch_embed", None)
    size = getattr(embedding, "img_size", None)
    if isinstance(size, (tuple, list)):
        height, width = size
    yield image_example(model, 2, getattr(model, "in_chans", channels), height, width)
