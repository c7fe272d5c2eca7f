"""Answers for the few operations that ask a tensor for its values, where it has none.

A forward on the meta device has shapes and no numbers. Where a model's control flow depends on
numbers, one of its branches is taken; where it selects elements, it is given all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def stand_in(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an aten operation on meta tensors, with an answer of ours where it needs values."""
    answer = _ANSWERS.get(func) or _ANSWERS_BY_NAME.get(func._schema.name)
    return answer(*args, **kwargs) if answer else func(*args, **kwargs)


def _scalar(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


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


_ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _scalar,
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _masked_select,
    aten.index.Tensor: _index,
    aten._unique2.default: _one_value,
}

_ANSWERS_BY_NAME: dict[str, Callable[..., Any]] = {"torchvision::nms": _keep_one}
"""Operations of libraries that are perhaps not imported."""
