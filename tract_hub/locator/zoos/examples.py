"""Example inputs: what to feed a model so that its pixels can be followed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from re import Pattern
from typing import Any, NamedTuple

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
        method: what to call instead of the forward, where only a part of the model can be run: a
            method, or a module inside, by its path.
        also: further calls, where one call cannot take all pixels.
        fixed: whether the shapes follow from the model's config; else others may be tried.
        skipped: names of fractional inputs that were not taken for pixels.

    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pixels: tuple[Tensor, ...] = ()
    channel_axis: int = 1
    method: str = "forward"
    also: tuple[Example, ...] = ()
    fixed: bool = False
    skipped: tuple[str, ...] = ()


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


class Input(NamedTuple):
    """A tensor among the inputs of a forward.

    Attributes:
        argument: the parameter of the forward that it was passed as.
        position: the number of that parameter; -1 where it was passed by name.
        name: what to call it: the parameter, an entry of a list of them, or a key in a mapping.
        tensor: itself.

    """

    argument: str
    position: int
    name: str
    tensor: Tensor

    def is_in(self, tensors: Iterable[Tensor]) -> bool:
        """Whether it is one of these tensors."""
        return any(self.tensor is tensor for tensor in tensors)


def inputs_of(function: Callable[..., Any], example: Example) -> list[Input]:
    """Name the tensors that an example passes to a function."""
    names: list[str] = []
    for parameter in signature(function).parameters.values():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(len(example.args) - len(names))]
        names.append(parameter.name)
    found = []
    for position, (name, value) in enumerate(zip(names, example.args, strict=False)):
        found += [Input(name, position, *leaf) for leaf in _leaves(name, value)]
    for name, value in example.kwargs.items():
        found += [Input(name, -1, *leaf) for leaf in _leaves(name, value)]
    return found


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(str(key), item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves(f"{name}[{i}]", item)


def marked(inputs: list[Input], example: Example, pixels: Sequence[str | int]) -> Example:
    """Take the inputs that a user says are pixels for pixels, and no others.

    Raises:
        ExampleInputError: there is no such input.

    """
    chosen = [i for i in inputs if {i.argument, i.name, i.position} & set(pixels)]
    known = {value for i in inputs for value in (i.argument, i.name, i.position)}
    unknown = [repr(entry) for entry in pixels if entry not in known]
    if unknown or not chosen:
        raise ExampleInputError(
            f"no input is called {', '.join(unknown)}: the tensors that the forward is given are "
            f"{', '.join(i.name for i in inputs)}; name some of them in pixels=(…)"
        )
    return replace(example, pixels=tuple(i.tensor for i in chosen))


def given_example(
    model: nn.Module,
    inputs: Any,
    pixels: Sequence[str | int] | None = None,
    own_names: Pattern[str] | None = None,
) -> Example:
    """Read a user's ``example_inputs``: a tensor, a tuple of them, or a mapping of named inputs.

    Args:
        model: whose forward takes them.
        inputs: the tensors; only their shapes matter.
        pixels: names or positions of those that are pixels; None to decide by their shapes.
        own_names: what the model's zoo calls inputs that are pixels.

    Raises:
        ExampleInputError: there is no tensor that could hold pixels, or a sparse or nested one.

    """
    name = type(model).__name__
    given = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
    if any(leaf.layout != torch.strided for leaf in given):
        raise ExampleInputError(
            f"{name}: example_inputs hold a sparse or nested tensor, which cannot be followed: "
            "pass dense ones of the same shapes, or name the layers with stems=[…]"
        )
    inputs = tree_map_only(Tensor, _shape_only, inputs)
    if isinstance(inputs, Mapping) and _takes_names(model, inputs):
        example = Example(kwargs=inputs)
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        example = Example(args=args)
    named = inputs_of(model.forward, example)
    if pixels is not None:
        return marked(named, example, pixels)
    candidates = [i for i in named if _may_be_pixels(i.tensor)]
    images = _images_among(candidates, own_names)
    if not images:
        raise ExampleInputError(
            f"{name}: example_inputs hold no tensor of pixels (fractional or uint8, with two "
            "dimensions or more): pass what the model's forward takes, as a tensor, a tuple or a "
            "dict, and say which of them are pixels with pixels=(…)"
        )
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


def _takes_names(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether a forward takes these inputs by name, and not as one dict (as NaFlex models do)."""
    parameters = signature(model.forward).parameters
    anything = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    return anything or all(name in parameters for name in names)


def _shape_only(tensor: Tensor) -> Tensor:
    """Pixels are followed, not computed; small integers (grids, positions) keep their values."""
    keep = not tensor.is_floating_point() and tensor.dtype != torch.uint8
    return tensor.detach().cpu() if keep else torch.empty_like(tensor, device="meta")
