"""Example inputs: what to feed a model so that its pixels can be followed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from tract_hub.errors import ExampleInputError


@dataclass(frozen=True)
class Example:
    """Inputs of one forward; tensors that only carry a shape are on the meta device.

    Attributes:
        args: positional inputs.
        kwargs: named inputs.
        pixels: those of the tensors that are pixels.
        channel_axis: where their channels are; an image of a list has no batch in front.
        environment: environment variables that the forward needs.
        method: what to call instead of the forward, where only a part of the model can be run: a
            method, or a module inside, by its path.
        also: further calls, where one call cannot take all pixels.
        fixed: whether the shapes follow from the model's config; else others may be tried.

    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pixels: tuple[Tensor, ...] = ()
    channel_axis: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    method: str = "forward"
    also: tuple[Example, ...] = ()
    fixed: bool = False


def image(model: nn.Module, *shape: int) -> Tensor:
    """Make pixels without values, in the dtype of the model's parameters."""
    return torch.empty(shape, dtype=pixel_dtype(model), device="meta")


def pixel_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first parameter that has fractions."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floating, torch.float32)


def image_example(model: nn.Module, *shape: int) -> Example:
    """Pixels of this shape as the only positional input."""
    pixels = image(model, *shape)
    return Example(args=(pixels,), pixels=(pixels,))


def images_example(model: nn.Module, count: int, *shape: int) -> Example:
    """Pixels of this shape as each of the first ``count`` positional inputs."""
    pixels = tuple(image(model, *shape) for _ in range(count))
    return Example(args=pixels, pixels=pixels)


def declared_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the height and width that a model, or one of its modules, says it was made for."""
    for module in model.modules():
        for name in _SIZES:
            value = getattr(module, name, None)
            sizes = value if isinstance(value, (tuple, list)) else (value, value)
            if len(sizes) >= 2 and all(type(size) is int and size > 0 for size in sizes):
                return sizes[-2], sizes[-1]
    return None


_SIZES = ("img_size", "image_size", "input_size", "input_resolution")


def given_example(model: nn.Module, inputs: Any) -> Example:
    """Read a user's ``example_inputs``: a tensor, a tuple of them, or a mapping of named inputs.

    Fractional tensors are taken for pixels, or 8-bit ones where there are none of them.

    Raises:
        ExampleInputError: there is no tensor that could hold pixels, or a sparse or nested one.

    """
    given = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    if any(leaf.layout != torch.strided for leaf in given):
        raise ExampleInputError(
            f"{type(model).__name__}: example_inputs hold a sparse or nested tensor, which cannot "
            "be followed: pass dense ones of the same shapes, or name the layers with stems=[…]"
        )
    inputs = tree_map_only(Tensor, _shape_only, inputs)
    leaves = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    pixels = [leaf for leaf in leaves if leaf.is_floating_point()]
    pixels = pixels or [leaf for leaf in leaves if leaf.dtype == torch.uint8]
    if not pixels:
        raise ExampleInputError(
            f"{type(model).__name__}: example_inputs hold no tensor of pixels (fractional or "
            "uint8): pass what the model's forward takes, as a tensor, a tuple or a dict"
        )
    if isinstance(inputs, Mapping) and _takes_names(model, inputs):
        return Example(kwargs=inputs, pixels=tuple(pixels))
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return Example(args=args, pixels=tuple(pixels))


def _takes_names(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether a forward takes these inputs by name, and not as one dict (as NaFlex models do)."""
    parameters = signature(model.forward).parameters
    anything = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    return anything or all(name in parameters for name in names)


def _shape_only(tensor: Tensor) -> Tensor:
    """Pixels are followed, not computed; small integers (grids, positions) keep their values."""
    keep = not tensor.is_floating_point() and tensor.dtype != torch.uint8
    return tensor.detach().cpu() if keep else torch.empty_like(tensor, device="meta")
