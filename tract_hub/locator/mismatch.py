"""What a forward that failed was missing: the size that a layer wanted and the one it got."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_hub.locator.graph import Kind
from tract_hub.method.calls import read_call


@dataclass(frozen=True)
class Mismatch:
    """Two sizes that should have been equal.

    Attributes:
        wanted: the size that the model's own tensors have.
        got: the size that came from the inputs.
        kind: what the tensor that came from the inputs was.

    """

    wanted: int
    got: int
    kind: Kind


def mismatch_of(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    kind_of: Callable[[Tensor], Kind | None],
) -> Mismatch | None:
    """Read a call that failed.

    Args:
        func: a torch function.
        args: its positional arguments.
        kwargs: its named arguments.
        kind_of: says what a tensor is, None where it did not come from the inputs.

    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    inputs = [tensor for tensor in tensors if kind_of(tensor)]
    own = [tensor for tensor in tensors if not kind_of(tensor)]
    if not inputs:
        return None
    kind = kind_of(inputs[0])
    sizes = _sizes(func, args, kwargs, inputs[0], own[0] if own else None)
    if sizes is None or kind is None or sizes[0] == sizes[1] or 0 in sizes:
        return None
    return Mismatch(*sizes, kind)


def _sizes(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    given: Tensor,
    own: Tensor | None,
) -> tuple[int, int] | None:
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
    if own.dim() == 1 and given.dim() > 1 and func in _BY_CHANNEL:
        return own.shape[0], given.shape[1]
    return _broadcast(given.shape, own.shape)


_BY_CHANNEL = (F.batch_norm, F.instance_norm, F.group_norm, F.prelu, torch.prelu)


def _reshaped(args: Sequence[Any], given: Tensor) -> tuple[int, int] | None:
    """Read ``view(-1, features)``, ``view(batch, …)`` and ``view(batch, heads, -1, places)``."""
    shape = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]
    if len(shape) < 2 or not given.dim() or not all(type(size) is int for size in shape):
        return None
    if min(shape[1:]) > 0:
        return math.prod(shape[1:]), given.numel() // max(1, given.shape[0])
    places = math.prod(shape[list(shape).index(-1) + 1 :]) if -1 in shape else 0
    return (places, given.shape[2:].numel()) if given.dim() == 4 and places > 1 else None


def _broadcast(given: Sequence[int], own: Sequence[int]) -> tuple[int, int] | None:
    for got, wanted in zip(reversed(given), reversed(own), strict=False):
        if got != wanted and 1 not in (got, wanted):
            return wanted, got
    return None
