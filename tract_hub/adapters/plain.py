"""Any other module: try the usual shapes of images."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tract_hub.adapters.examples import Example, image_example


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield images of usual sizes and channels; rows of features for a model that starts Linear."""
    for size in (224, 32, 28):
        for channels in (3, 1):
            yield image_example(model, 2, channels, size, size)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield image_example(model, 2, module.in_features)
            return
