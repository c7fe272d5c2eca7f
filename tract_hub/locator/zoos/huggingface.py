"""Hugging Face Transformers: a config and a forward's parameters say what its images look like."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from torch import nn

from tract_hub.errors import ExampleInputError
from tract_hub.locator.zoos.examples import Example, pixel_dtype
from tract_hub.locator.zoos.hf_config import ImageSizes, Settings
from tract_hub.locator.zoos.hf_inputs import (
    NOT_AT_FIRST,
    PIXELS,
    SPECTROGRAMS,
    UNNAMED_PIXELS,
    Situation,
    layout_pairs,
    make_inputs,
    maker_of,
)

PARTS = ("get_image_features", "get_video_features")
"""Methods that read the pixels of a model whose forward needs more than can be guessed."""

Names = list[str]


def takes_pixels(cls: Any) -> bool:
    """Whether the forward of a class of models takes images or video."""
    names, _ = _parameters(cls.forward)
    return bool(_pixels_of(names)) or {"hidden_states", "grid_thw"} <= set(names)


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield example inputs for a Transformers model, the likeliest first."""
    names, required = _parameters(model.forward)
    pixels = _pixel_names(model, names)
    yield from _parts(model, set(pixels))
    sound = any(SPECTROGRAMS.fullmatch(name) for name in pixels)
    # What can be made, and no sound where there are pixels:
    made = [n for n in names if maker_of(n) and (sound or "features" not in n)]
    known = [n for n in names if n in pixels or n in made]
    for choice in _choices(known, pixels, required):
        yield from _calls(model, choice)
    if heard := [n for n in names if SPECTROGRAMS.fullmatch(n) and n not in pixels]:
        yield from _calls(model, [*known, *heard])
    yield from _models_inside(model, set(pixels))
    yield from _embeddings(model, pixels)
    images = {n for n in pixels if "video" not in n}
    if images != set(pixels):  # what reads its images reads its videos too (PerceptionLM)
        yield from _parts(model, images)
        yield from _models_inside(model, images)


def _choices(known: Names, pixels: Names, required: set[str]) -> Iterator[Names]:
    """Yield names of inputs to give together: the usual ones, more of them, the fewest."""
    usual = [n for n in known if n not in NOT_AT_FIRST or n in required]
    fewest = [n for n in known if n in required or n in pixels]
    masked = [n for n in known if n in usual or n == "bool_masked_pos"]
    for i, choice in enumerate(choices := [usual, masked, known, fewest]):
        if choice not in choices[:i]:
            yield choice


def _parameters(function: Callable[..., Any]) -> tuple[Names, set[str]]:
    """Return the names of a function's parameters, and which of them must be given."""
    named = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    return list(named), {name for name, p in named.items() if p.default is p.empty}


def _pixels_of(names: Iterable[str]) -> Names:
    return [name for name in names if PIXELS.fullmatch(name)]


def _pixel_names(model: nn.Module, names: Names) -> Names:
    if any(_pixels_of(_parameters(getattr(model, part, _nothing))[0]) for part in PARTS):
        return _pixels_of(names)
    for pattern in (PIXELS, SPECTROGRAMS, UNNAMED_PIXELS):
        found = [name for name in names if pattern.fullmatch(name)]
        if found:
            return found
    raise ExampleInputError(
        f"{type(model).__name__} takes no pixels: its forward's inputs are "
        f"{', '.join(names[:6])}, …; if some of them hold pixels, pass example_inputs={{…}} with "
        "the pixels as a tensor of fractions, or name its first layers with stems=[…]"
    )


def _nothing() -> None:
    """Stand in for a method that a model does not have."""


def _calls(model: nn.Module, names: Names, method: str = "forward") -> Iterator[Example]:
    """Yield calls with these inputs, in every layout of the pixels that their names allow."""
    settings = Settings(getattr(model, "config", None))
    sizes, dtype = _sizes(model, settings), pixel_dtype(model)
    for layout, video_layout in layout_pairs(names):
        situation = Situation(sizes, settings, layout, video_layout, dtype)
        kwargs, pixels = make_inputs(names, situation)
        yield Example(kwargs=kwargs, pixels=pixels, method=method, fixed=True)


def _sizes(model: nn.Module, settings: Settings) -> ImageSizes:
    """Return the config's sizes, or those that a timm model inside knows."""
    sizes = settings.image_sizes()
    for module in model.modules():
        shape = getattr(getattr(module, "patch_embed", None), "img_size", None)
        if isinstance(shape, (tuple, list)):
            sizes = replace(sizes, height=shape[0], width=shape[1])
    return sizes


def _parts(model: nn.Module, pixels: set[str]) -> Iterator[Example]:
    """Yield calls of the methods that together read all pixels, if there are such methods."""
    calls: list[list[Example]] = []
    for method in PARTS:
        names, _ = _parameters(getattr(model, method, _nothing))
        read = pixels.intersection(names) if pixels else set(_pixels_of(names))
        if read:
            known = [n for n in names if n in read or maker_of(n)]
            few = [n for n in known if n not in NOT_AT_FIRST]
            calls.append([*_calls(model, few, method), *_calls(model, known, method)])
            pixels = pixels - read
    if calls and not pixels:
        for first, *others in product(*calls):
            yield replace(first, also=tuple(others))


def _models_inside(model: nn.Module, pixels: set[str]) -> Iterator[Example]:
    """Yield calls of the models inside that take all the pixels under the same names."""
    inside = dict(_outermost_inside(model))
    taken = {name for tower in inside.values() for name in _parameters(tower.forward)[0]}
    if not inside or not pixels <= taken:
        return
    calls = [
        [_below(path, example) for example in examples(tower)] for path, tower in inside.items()
    ]
    for first, *others in product(*calls):
        further = [call for other in others for call in (other, *other.also)]
        yield replace(first, also=(*first.also, *further))


def _embeddings(model: nn.Module, pixels: Names) -> Iterator[Example]:
    """Yield calls of the module that Transformers' own interface says embeds the pixels."""
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not every class says so
        return
    for path, module in model.named_modules():
        if module is embeddings and not isinstance(module, nn.Embedding):
            names, _ = _parameters(module.forward)
            yield from _calls(model, [n for n in names if n in pixels], path)


def _outermost_inside(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the path of each model that takes pixels inside another, but none inside those."""
    for name, child in model.named_children():
        is_model = hasattr(child, "config") and hasattr(child, "main_input_name")
        if is_model and _pixels_of(_parameters(child.forward)[0]):
            yield prefix + name, child
        else:
            yield from _outermost_inside(child, f"{prefix}{name}.")


def _below(path: str, example: Example) -> Example:
    """Make a call of a model the call of one inside another."""
    method = path if example.method == "forward" else f"{path}.{example.method}"
    also = tuple(_below(path, call) for call in example.also)
    return replace(example, method=method, also=also)
