"""Any other module: its layers tell the rank and the channels of what it takes.

Sizes and channels that do not fit are found by ``search``: only the rank has to be guessed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tract_hub.locator.zoos.examples import Example, declared_size, images_example

_SPACE = {3: (16_000,), 4: (224, 224), 5: (16, 112, 112)}
"""Rank of the input → usual sizes of a signal, an image, a clip."""


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield example inputs, one of each rank that may fit."""
    size = declared_size(model)
    for rank, channels in _ranks(model).items():
        space = _SPACE.get(rank, ())
        if size and rank > 3:
            space = (*space[:-2], *size)
        yield images_example(model, 2, channels, *space)


def _ranks(model: nn.Module) -> dict[int, int]:
    """Ranks that the input may have → its channels, by the layers in order, the likeliest first."""
    ranks: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            ranks.setdefault(len(module.kernel_size) + 2, module.in_channels)
        elif isinstance(module, nn.Linear):
            ranks.setdefault(2, module.in_features)
    if not ranks:  # layers written with functions: the weights have the rank of their input
        for parameter in model.parameters():
            if 2 <= parameter.dim() <= 5:
                ranks.setdefault(parameter.dim(), parameter.shape[1])
    ranks.setdefault(4, 3)
    return ranks
