"""Example inputs: what to feed a model so that its pixels can be followed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from operator import attrgetter
from re import Pattern
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tract_hub.errors import ExampleInputError


@dataclass(frozen=True)
class Example:
    """Inputs of one forward; tensors that only carry a shape are on the meta device."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pixels: tuple[Tensor, ...] = ()  # those of the tensors that are pixels
    channel_axis: int = 1  # of the pixels: an image of a list has no batch in front
    method: str = "forward"  # or another to call; or a module inside, by its path
    also: tuple[Example, ...] = ()  # further calls, where one call cannot take all pixels
    fixed: bool = False  # whether the shapes follow from the config; else others may be tried
    skipped: tuple[str, ...] = ()  # names of fractional inputs that were not taken for pixels


def image(model: nn.Module, *shape: int) -> Tensor:
    """Make pixels without values, in the dtype of the model's parameters."""
    return torch.empty(shape, dtype=pixel_dtype(model), device="meta")


def pixel_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first parameter that has fractions."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floating, torch.float32)


def images_example(model: nn.Module, *shape: int) -> Example:
    """Pixels of this shape as each input that a forward cannot do without, or as its first.

    What it calls ``labels`` gets a class for each image: it is for a loss, or a conditional model.
    """
    parameters = list(signature(model.forward).parameters.values())
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in variable]
    labels = torch.zeros(shape[0], dtype=torch.long)
    given = {
        p: labels if p.name in ("label", "labels") else image(model, *shape)
        for p in required or parameters[:1]
    }
    named = {p.name: value for p, value in given.items() if p.kind is Parameter.KEYWORD_ONLY}
    args = tuple(value for p, value in given.items() if p.name not in named)
    pixels = tuple(value for value in given.values() if value is not labels)
    return Example(args=args, kwargs=named, pixels=pixels)


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


class Input(NamedTuple):
    """A tensor among the inputs of a forward."""

    argument: str
    position: int | None  # of the argument; None where the forward does not name it
    name: str  # the argument, an entry of a list of them, or a key in a mapping
    tensor: Tensor


def inputs_of(model: nn.Module, example: Example) -> list[Input]:
    """Name the tensors that an example passes to a model."""
    names: list[str] = []
    for parameter in signature(attrgetter(example.method)(model)).parameters.values():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(len(example.args) - len(names))]
        names.append(parameter.name)
    positions = {name: position for position, name in enumerate(names)}
    given = [*zip(names, example.args, strict=False), *example.kwargs.items()]
    return [
        Input(name, positions.get(name), *leaf)
        for name, value in given
        for leaf in _leaves(name, value)
    ]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(str(key), item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves(f"{name}[{i}]", item)


def marked(model: nn.Module, example: Example, pixels: Sequence[str | int] | None) -> Example:
    """Take the inputs that a user says are pixels for pixels, and no others."""
    if pixels is None and example.pixels:
        return example
    if pixels is None:
        raise ExampleInputError(
            f"{type(model).__name__}: example_inputs hold no tensor of pixels (fractional or "
            "uint8, with two dimensions or more): pass what the model's forward takes, as a "
            "tensor, a tuple or a dict, and say which of them are pixels with pixels=(…)"
        )
    inputs = inputs_of(model, example)
    chosen = [i for i in inputs if {i.argument, i.name, i.position} & set(pixels)]
    known = {value for i in inputs for value in (i.argument, i.name, i.position)}
    unknown = [repr(entry) for entry in pixels if entry not in known]
    if unknown or not chosen:
        raise ExampleInputError(
            f"no input is called {', '.join(unknown)}: the tensors that the forward is given are "
            f"{', '.join(i.name for i in inputs)}; name some of them in pixels=(…)"
        )
    return replace(example, pixels=tuple(i.tensor for i in chosen), skipped=())


def given_example(model: nn.Module, inputs: Any, own_names: Pattern[str] | None) -> Example:
    """Read a user's ``example_inputs``: a tensor, a tuple of them, or a mapping of named inputs.

    ``own_names`` are what the model's zoo calls inputs that are pixels.
    """
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if any(leaf.layout != torch.strided for leaf in given):
        raise ExampleInputError(
            f"{type(model).__name__}: example_inputs hold a sparse or nested tensor, which cannot "
            "be followed: pass dense ones of the same shapes, or name the layers with stems=[…]"
        )
    inputs = tree_map_only(Tensor, _shape_only, inputs)
    parameters = signature(model.forward).parameters
    anything = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    if isinstance(inputs, Mapping) and (anything or parameters.keys() >= inputs.keys()):
        example = Example(kwargs=inputs, fixed=True)
    else:  # also one dict that is passed as such, as NaFlex models take it
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        example = Example(args=args, fixed=True)
    candidates = [i for i in inputs_of(model, example) if _may_be_pixels(i.tensor)]
    images = _images_among(candidates, own_names)
    skipped = tuple(i.name for i in candidates if i not in images)
    return replace(example, pixels=tuple(i.tensor for i in images), skipped=skipped)


def _may_be_pixels(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.dtype == torch.uint8


def _images_among(inputs: list[Input], own_names: Pattern[str] | None) -> list[Input]:
    """Tell images from metadata, poses and time steps: by name, else by what an image is.

    It has four dimensions or more; with three, it is as high and wide as such an image. Where
    there is none of these, any three dimensions do, and else two: a batch of flat images.
    """
    named = [i for i in inputs if own_names and own_names.fullmatch(i.name)]
    if named:
        return named
    images = [i for i in inputs if i.tensor.dim() >= 4]
    if images:
        sizes = {i.tensor.shape[-2:] for i in images}
        return [i for i in inputs if i.tensor.dim() >= 3 and i.tensor.shape[-2:] in sizes]
    return [i for i in inputs if i.tensor.dim() == 3] or [i for i in inputs if i.tensor.dim() == 2]


def _shape_only(tensor: Tensor) -> Tensor:
    """Pixels are followed, not computed; small integers (grids, positions) keep their values."""
    if _may_be_pixels(tensor):
        return torch.empty_like(tensor, device="meta")
    return tensor.detach().cpu()
