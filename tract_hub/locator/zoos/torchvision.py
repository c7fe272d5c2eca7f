"""torchvision: its detectors take lists of images; all others take what their layers tell."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tract_hub.locator.zoos import plain
from tract_hub.locator.zoos.examples import Example, image


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield example inputs for a torchvision model, or one derived from its classes."""
    if any(".models.detection" in cls.__module__ for cls in type(model).__mro__):
        images = [image(model, 3, 320, 320), image(model, 3, 320, 320)]
        yield Example(args=(images,), pixels=tuple(images), channel_axis=0)
    else:
        yield from plain.examples(model)
