"""Hugging Face Transformers: a config and a forward's parameters say what its images look like."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from operator import attrgetter
from typing import Any

from torch import nn

from tract_hub.errors import ExampleInputError
from tract_hub.locator.zoos import hf_inputs
from tract_hub.locator.zoos.examples import Example, pixel_dtype
from tract_hub.locator.zoos.hf_config import ImageSizes, Settings
from tract_hub.locator.zoos.hf_inputs import PIXELS, SPECTROGRAMS, UNNAMED_PIXELS

PARTS = ("get_image_features", "get_video_features")
"""Methods that read the pixels of a model whose forward needs more than can be guessed."""

Names = list[str]


def takes_pixels(cls: Any) -> bool:
    """Whether the forward of a class of models takes images or video."""
    names, _ = _parameters(cls.forward)
    return bool(_pixels_of(names)) or {"hidden_states", "grid_thw"} <= set(names)


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield example inputs for a Transformers model, the likeliest first."""
    pixels = _pixel_names(model)
    yield from _methods(model, pixels)
    yield from _calls(model, "forward", pixels)
    yield from _models_inside(model, pixels)
    yield from _embeddings(model, pixels)
    images = {name for name in pixels if "video" not in name}
    if images != pixels:  # what reads its images reads its videos too (PerceptionLM)
        yield from _methods(model, images)
        yield from _models_inside(model, images)


def _parameters(function: Callable[..., Any]) -> tuple[Names, set[str]]:
    """Return the names of a function's parameters, and which of them must be given."""
    named = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    return list(named), {name for name, p in named.items() if p.default is p.empty}


def _inputs_of_method(model: nn.Module, name: str) -> Names:
    return _parameters(getattr(model, name))[0] if hasattr(model, name) else []


def _pixels_of(names: Iterable[str]) -> Names:
    return [name for name in names if PIXELS.fullmatch(name)]


def _pixel_names(model: nn.Module) -> set[str]:
    names, _ = _parameters(model.forward)
    of_methods = [name for part in PARTS for name in _inputs_of_method(model, part)]
    found = _pixels_of(names) or _pixels_of(of_methods)
    for pattern in (SPECTROGRAMS, UNNAMED_PIXELS):
        found = found or [name for name in names if pattern.fullmatch(name)]
    if found:
        return set(found)
    raise ExampleInputError(
        f"{type(model).__name__} takes no pixels: its forward's inputs are "
        f"{', '.join(names[:6])}, …; if some of them hold pixels, pass example_inputs={{…}} with "
        "the pixels as a tensor of fractions, or name its first layers with stems=[…]"
    )


def _calls(model: nn.Module, path: str, pixels: set[str]) -> Iterator[Example]:
    """Yield calls of a model's method, or of a module inside, in every layout of the pixels.

    They are given the usual inputs that can be made, then all of them, the fewest, and at last
    sound beside the pixels.
    """
    part = attrgetter(path)(model)
    names, required = _parameters(part.forward if isinstance(part, nn.Module) else part)
    heard = [n for n in names if n in pixels or hf_inputs.maker_of(n) or SPECTROGRAMS.fullmatch(n)]
    silent = [n for n in heard if n in pixels or not n.startswith(("input_f", "input_v"))]
    usual = [n for n in silent if n not in hf_inputs.NOT_AT_FIRST or n in required]
    masked = [n for n in silent if n in usual or n == "bool_masked_pos"]  # FlavaForPreTraining
    fewest = [n for n in silent if n in required or n in pixels]
    settings = Settings(getattr(model, "config", None))
    sizes, dtype = _sizes(model, settings), pixel_dtype(model)
    made = set()
    for choice in dict.fromkeys(map(tuple, (usual, masked, silent, fewest, heard))):
        for layout in hf_inputs.layouts_for(choice):
            situation = hf_inputs.Situation(sizes, settings, layout, dtype)
            kwargs = {name: hf_inputs.make_input(name, situation) for name in choice}
            if str(kwargs) not in made:  # videos of several layouts are alike
                made.add(str(kwargs))
                read = tuple(kwargs[name] for name in choice if name in pixels)
                yield Example(kwargs=kwargs, pixels=read, method=path, fixed=True)


def _sizes(model: nn.Module, settings: Settings) -> ImageSizes:
    """Return the config's sizes, or those that a timm model inside knows."""
    sizes = settings.image_sizes()
    for module in model.modules():
        shape = getattr(getattr(module, "patch_embed", None), "img_size", None)
        if isinstance(shape, (tuple, list)):
            sizes = replace(sizes, height=shape[0], width=shape[1])
    return sizes


def _methods(model: nn.Module, pixels: set[str]) -> Iterator[Example]:
    """Yield calls of the methods that together read all pixels, if there are such methods."""
    calls = []
    for part in PARTS:
        read = pixels.intersection(_inputs_of_method(model, part))
        if read:
            calls.append(list(_calls(model, part, read)))
        pixels = pixels - read
    if calls and not pixels:
        yield from _together(calls)


def _models_inside(model: nn.Module, pixels: set[str]) -> Iterator[Example]:
    """Yield calls of the models inside that take all the pixels under the same names."""
    inside = dict(_outermost_inside(model))
    taken = {name for tower in inside.values() for name in _parameters(tower.forward)[0]}
    if inside and pixels <= taken:
        yield from _together(
            [_below(path, example) for example in examples(tower)] for path, tower in inside.items()
        )


def _together(calls: Iterable[list[Example]]) -> Iterator[Example]:
    """Yield one call of each list, in every combination."""
    for first, *others in product(*calls):
        further = [call for other in others for call in (other, *other.also)]
        yield replace(first, also=(*first.also, *further))


def _embeddings(model: nn.Module, pixels: set[str]) -> Iterator[Example]:
    """Yield calls of the module that Transformers' own interface says embeds the pixels."""
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not every class says so
        return
    for path, module in model.named_modules():
        if module is embeddings and not isinstance(module, nn.Embedding):
            yield from _calls(model, path, pixels)


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
