"""Which adapter knows a model."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import nn

from tract_hub.locator.zoos import plain
from tract_hub.locator.zoos.examples import Example, images_example

ZOOS = {"timm": "timm", "transformers": "huggingface", "torchvision": "torchvision"}
"""Top-level package of a model's class → the adapter that knows it."""


def zoo_of(model: nn.Module) -> Any:
    """Return the adapter of the zoo that a model's class, or a class below it, is from."""
    for cls in type(model).__mro__:
        zoo = ZOOS.get(cls.__module__.partition(".")[0])
        if zoo:
            return importlib.import_module(f"tract_hub.locator.zoos.{zoo}")
    return None


def declared_stems(model: nn.Module) -> set[str]:
    """Return the weights that a model's zoo records as its first; none where it keeps no record."""
    declare = getattr(zoo_of(model), "declared_stems", None)
    return declare(model) if declare else set()


def examples_for(model: nn.Module) -> Iterator[Example]:
    """Yield example inputs for a model, the likeliest first."""
    zoo = zoo_of(model)
    if zoo:
        yield from zoo.examples(model)
        return
    inside = (m for m in model.modules() if zoo_of(m) and ".models." in f"{type(m).__module__}.")
    for module in islice(inside, 1):
        for example in zoo_of(module).examples(module):
            yield images_example(model, *example.pixels[0].shape)
            yield example
    yield from plain.examples(model)
