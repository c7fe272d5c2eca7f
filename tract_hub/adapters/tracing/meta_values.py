"""Answers for the few operations that ask a tensor for its values, where it has none.

A forward on the meta device has shapes and no numbers. Where a model's control flow depends on
numbers, one of its branches is taken; where it selects elements, it is given all of them. Small
tensors that a forward makes or moves keep their numbers, whatever device it names: grids, sizes
and offsets are often read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tract_hub.adapters.tracing.skeleton import SMALL

aten = torch.ops.aten


def stand_in(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an aten operation on meta tensors, with an answer of ours where it needs values."""
    answer = _ANSWERS.get(func) or _ANSWERS_BY_NAME.get(func._schema.name)
    return answer(*args, **kwargs) if answer else func(*args, **kwargs)


def keep_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the named arguments of an aten operation on real tensors, or on none.

    What it makes for, or moves to, the meta device stays on the CPU where it is small.
    """
    device = kwargs.get("device")
    if device is None or torch.device(device).type == "cpu":
        return kwargs
    sizes = _SIZES.get(func)
    small = sizes is not None and sizes(*args) <= SMALL
    return {**kwargs, "device": torch.device("cpu" if small else "meta")}


def _scalar(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


def stand_in_list(tensor: Tensor) -> Any:
    """Answer ``tolist`` for a tensor without values."""
    return torch.full(tensor.shape, _scalar(tensor), dtype=tensor.dtype, device="cpu").tolist()


def _nonzero(tensor: Tensor) -> Tensor:
    return torch.empty((tensor.numel(), tensor.dim()), dtype=torch.int64, device="meta")


def _masked_select(tensor: Tensor, mask: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    return tensor.expand(shape).reshape(-1)


def _index(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Index with every mask taken to be all true."""
    whole: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            whole.append(index)
            continue
        count = math.prod(index.shape)
        picks = [torch.empty(count, dtype=torch.int64, device="meta") for _ in index.shape]
        whole.extend(picks)
    return aten.index.Tensor(tensor, whole)  # type: ignore[no-any-return]


def _one_value(tensor: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Values, their places and their counts, where all elements are taken to be equal."""
    places = torch.empty(tensor.shape, dtype=torch.int64, device="meta")
    return tensor.new_empty(1), places, places.new_empty(1)


def _keep_one(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Detections are handled one by one: one shows as much as a thousand."""
    return torch.empty(min(1, scores.numel()), dtype=torch.int64, device="meta")


def _to_copy(tensor: Tensor, **kwargs: Any) -> Tensor:
    """Whatever has no values cannot leave the meta device."""
    return aten._to_copy.default(tensor, **{**kwargs, "device": torch.device("meta")})  # type: ignore[no-any-return]


_ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _scalar,
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _masked_select,
    aten.index.Tensor: _index,
    aten._unique2.default: _one_value,
    aten._to_copy.default: _to_copy,
}

_ANSWERS_BY_NAME: dict[str, Callable[..., Any]] = {"torchvision::nms": _keep_one}
"""Operations of libraries that are perhaps not imported."""

_SIZES: dict[Any, Callable[..., float]] = {
    aten._to_copy.default: lambda tensor: tensor.numel(),
    aten.zeros.default: math.prod,
    aten.ones.default: math.prod,
    aten.full.default: lambda size, value: math.prod(size),
    aten.arange.default: lambda end: end,
    aten.arange.start: lambda start, end: abs(end - start),
    aten.arange.start_step: lambda start, end, step=1: abs(end - start) / abs(step),
    aten.linspace.default: lambda start, end, steps: steps,
    aten.scalar_tensor.default: lambda value: 1,
    aten.zeros_like.default: lambda tensor: tensor.numel(),
    aten.ones_like.default: lambda tensor: tensor.numel(),
    aten.full_like.default: lambda tensor, value: tensor.numel(),
}
"""Operations that make or move real tensors → the number of elements."""
