"""Hugging Face Transformers: a config says what its images look like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tract_hub.adapters.examples import Example, image


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield example inputs for a Transformers model that takes ``pixel_values``."""
    config: Any = getattr(model, "config", None)
    channels = getattr(config, "num_channels", 3)
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    pixels = image(model, 2, channels, height, width)
    yield Example(kwargs={"pixel_values": pixels}, pixels=(pixels,))
