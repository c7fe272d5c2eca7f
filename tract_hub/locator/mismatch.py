"""What a forward that failed was missing: the size that a layer wanted and the one it got."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_hub.locator.graph import Kind
from tract_hub.method.calls import read_call

Sizes = tuple[int, int]


class Mismatch(NamedTuple):
    """The size that the model's own tensors have, and the other one that came from the inputs."""

    wanted: int
    got: int
    of_features: bool  # else of what no layer has read yet


def mismatch_of(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    kind_of: Callable[[Tensor], Kind | None],
) -> Mismatch | None:
    """Read a call of a torch function that failed; tensors of the model itself have no kind."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    inputs = [tensor for tensor in tensors if kind_of(tensor)]
    own = [tensor for tensor in tensors if not kind_of(tensor)]
    sizes = _sizes(func, args, kwargs, inputs[0], own[0] if own else None) if inputs else None
    if sizes is None or sizes[0] == sizes[1] or 0 in sizes:
        return None
    return Mismatch(*sizes, of_features=kind_of(inputs[0]) is Kind.FEATURES)


def _sizes(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    given: Tensor,
    own: Tensor | None,
) -> Sizes | None:
    if func in (torch.Tensor.view, torch.Tensor.reshape, torch.reshape):
        return _reshaped(args, given)
    if own is None:
        return None
    call = read_call(func, tuple(args), kwargs)
    if call and call.convolution:
        spatial = len(call.convolution.kernel)
        channels = call.input.shape[-spatial - 1] if call.input.dim() > spatial else 0
        return call.weight.shape[1] * call.groups, channels
    if call:
        return call.in_features, call.input.shape[-1]
    if func is F.layer_norm:
        return own.numel(), given.shape[given.dim() - own.dim() :].numel()
    pairs = zip(reversed(own.shape), reversed(given.shape), strict=False)
    return next((pair for pair in pairs if pair[0] != pair[1] and 1 not in pair), None)


def _reshaped(args: Sequence[Any], given: Tensor) -> Sizes | None:
    """Read ``view(-1, n)``, ``view(batch, …)``; EfficientFormerV2's ``view(b, heads, -1, n)``."""
    shape = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]
    if len(shape) < 2 or not given.dim() or not all(type(size) is int for size in shape):
        return None
    if min(shape[1:]) > 0:
        return math.prod(shape[1:]), given.numel() // max(1, given.shape[0])
    places = math.prod(shape[list(shape).index(-1) + 1 :]) if -1 in shape else 0
    return (places, given.shape[2:].numel()) if given.dim() == 4 and places > 1 else None
