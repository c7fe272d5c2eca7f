"""Example inputs: what to feed a model so that its pixels can be followed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from tract_hub.errors import ExampleInputError

ZOOS = {"timm": "timm", "transformers": "huggingface", "torchvision": "torchvision"}
"""Top-level package of a model's class → the adapter that knows it."""


@dataclass(frozen=True)
class Example:
    """Inputs of one forward; tensors that only carry a shape are on the meta device.

    Attributes:
        args: positional inputs.
        kwargs: named inputs.
        pixels: those of the tensors that are pixels.
        environment: environment variables that the forward needs.
        method: what to call instead of the forward, where only a part of the model can be run.
        also: further calls, where one call cannot take all pixels.

    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pixels: tuple[Tensor, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    method: str = "forward"
    also: tuple[Example, ...] = ()


def image(model: nn.Module, *shape: int) -> Tensor:
    """Make pixels without values, in the dtype of the model's parameters."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.empty(shape, dtype=next(floating, torch.float32), device="meta")


def image_example(model: nn.Module, *shape: int) -> Example:
    """Pixels of this shape as the only positional input."""
    pixels = image(model, *shape)
    return Example(args=(pixels,), pixels=(pixels,))


def examples_for(model: nn.Module) -> Iterator[Example]:
    """Yield example inputs for a model, the likeliest first."""
    for cls in type(model).__mro__:
        zoo = ZOOS.get(cls.__module__.partition(".")[0])
        if zoo:
            adapter = importlib.import_module(f"tract_hub.adapters.{zoo}")
            yield from adapter.examples(model)
            return
    plain = importlib.import_module("tract_hub.adapters.plain")
    yield from plain.examples(model)


def given_example(model: nn.Module, inputs: Any) -> Example:
    """Read a user's ``example_inputs``: a tensor, a tuple of them, or a mapping of named inputs.

    Fractional tensors are taken for pixels, or 8-bit ones where there are none of them.

    Raises:
        ExampleInputError: there is no tensor that could hold pixels.

    """
    inputs = tree_map_only(Tensor, _shape_only, inputs)
    leaves = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    pixels = [leaf for leaf in leaves if leaf.is_floating_point()]
    pixels = pixels or [leaf for leaf in leaves if leaf.dtype == torch.uint8]
    if not pixels:
        raise ExampleInputError(
            f"{type(model).__name__}: example_inputs hold no tensor of pixels (fractional or "
            "uint8): pass what the model's forward takes, as a tensor, a tuple or a dict"
        )
    if isinstance(inputs, Mapping):
        return Example(kwargs=inputs, pixels=tuple(pixels))
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return Example(args=args, pixels=tuple(pixels))


def _shape_only(tensor: Tensor) -> Tensor:
    """Pixels are followed, not computed; small integers (grids, positions) keep their values."""
    keep = not tensor.is_floating_point() and tensor.dtype != torch.uint8
    return tensor.detach().cpu() if keep else torch.empty_like(tensor, device="meta")
