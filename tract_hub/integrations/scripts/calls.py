"""Read the call of a model: its inputs, and what the callers name the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tract_hub.locator.unwrap import unwrap

_NOT_THE_SCRIPT = ("torch", "tract_hub", "runpy")


def fresh_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether there are tensors that may be pixels, and no graph made any of them."""
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    pixels = [t for t in tensors if t.is_floating_point() or t.dtype == torch.uint8]
    return bool(pixels) and not any(tensor.requires_grad for tensor in pixels)


def named_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return a call's inputs as ``example_inputs``: a tuple, or a mapping where some are named."""
    if not kwargs:
        return args
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    parameters = inspect.signature(model.forward).parameters
    named: dict[str, Any] = {}
    for name, value in bound.items():
        if parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            return args
        named.update(
            value if parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        )
    return named


def names_in_callers(model: nn.Module, caller: FrameType | None) -> list[str]:
    """Return the variables, and attributes of ``self``, that hold a model where it is called.

    Those of the script itself, the outermost, come first.
    """
    names: dict[str, None] = {}
    while caller is not None:
        if str(caller.f_globals.get("__name__")).partition(".")[0] not in _NOT_THE_SCRIPT:
            here = [name for scope in _scopes(caller) for name in _holding(scope, model)]
            names = dict.fromkeys([*here, *names])
        caller = caller.f_back
    return list(names)


def _scopes(frame: FrameType) -> list[Mapping[str, Any]]:
    variables = dict(frame.f_locals)
    attributes = getattr(variables.get("self"), "__dict__", {})
    return [variables, attributes, attributes.get("_modules", {})]


def _holding(scope: Mapping[str, Any], model: nn.Module) -> list[str]:
    modules = {name: value for name, value in scope.items() if isinstance(value, nn.Module)}
    return [name for name, value in modules.items() if unwrap(value)[0] is model]
