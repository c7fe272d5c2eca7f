"""What a forward that failed was missing: the size that a layer wanted and the one it got."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_hub.locator.graph import Kind
from tract_hub.locator.values import tensors_in
from tract_hub.method.calls import read_call


class Mismatch(NamedTuple):
    """The size that the model's own tensors have, and the other one that came from the inputs."""

    wanted: int
    got: int
    of_features: bool  # else of what no layer has read yet


def mismatch_of(
    func: Any, args: Any, kwargs: Any, kind_of: Callable[[Tensor], Kind | None]
) -> Mismatch | None:
    """Read a call of a torch function that failed; tensors of the model itself have no kind."""
    tensors = list(tensors_in((args, kwargs)))
    given = next((tensor for tensor in tensors if kind_of(tensor)), None)
    own = next((tensor for tensor in tensors if not kind_of(tensor)), None)
    sizes = None if given is None else _sizes(func, args, kwargs, given, own)
    if given is None or sizes is None or sizes[0] == sizes[1] or 0 in sizes:
        return None
    return Mismatch(*sizes, of_features=kind_of(given) is Kind.FEATURES)


def _sizes(
    func: Any, args: Any, kwargs: Any, given: Tensor, own: Tensor | None
) -> tuple[int, int] | None:
    """Return the size that was wanted, and the one that was given."""
    if func in (Tensor.view, Tensor.reshape, torch.reshape):
        shape = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]
        is_told = len(shape) > 1 and all(type(size) is int for size in shape)
        if not (is_told and given.dim()):
            return None
        if min(shape[1:]) > 0:
            return math.prod(shape[1:]), given.numel() // max(1, given.shape[0])
        # EfficientFormerV2's view(batch, heads, -1, places), of another size than its published one
        places = math.prod(shape[list(shape).index(-1) + 1 :]) if -1 in shape else 0
        return (places, given.shape[2:].numel()) if given.dim() == 4 and places > 1 else None
    if own is None:
        return None
    call = read_call(func, args, kwargs)
    if call:
        kernel = call.convolution.kernel if call.convolution else ()
        channels = call.in_features * call.groups // math.prod(kernel)
        return channels, call.input.shape[-len(kernel) - 1] if call.input.dim() > len(kernel) else 0
    if func is F.layer_norm:
        return own.numel(), given.shape[given.dim() - own.dim() :].numel()
    pairs = zip(reversed(own.shape), reversed(given.shape), strict=False)
    return next((pair for pair in pairs if pair[0] != pair[1] and 1 not in pair), None)
