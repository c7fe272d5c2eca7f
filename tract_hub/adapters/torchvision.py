"""torchvision: images of any usual size."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tract_hub.adapters.examples import Example, image_example


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield example inputs for a torchvision model."""
    yield image_example(model, 2, 3, 224, 224)
    yield image_example(model, 2, 3, 299, 299)
