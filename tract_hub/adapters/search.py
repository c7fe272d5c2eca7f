"""From inputs that a model refused to inputs that it takes.

A forward that fails tells what it wanted: channels, where a layer read the pixels, or a number of
features or positions, where the image had another size than the model was made for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tract_hub.adapters.tracing.flow import Kind
from tract_hub.adapters.tracing.mismatch import Mismatch
from tract_hub.adapters.zoos.examples import Example

ATTEMPTS = 16
"""Forwards for one guess of the inputs: a size between 1 and 1024 is halved ten times."""

_USUAL, _LARGEST = 32, 2048
"""Most images' sides are multiples of the first, none is longer than the second."""

Point = tuple[int, float]


class ShapeSearch:
    """Proposes other shapes of the pixels, from what the last forward wanted."""

    def __init__(self) -> None:
        self._left = ATTEMPTS
        self._tried: set[tuple[int, ...]] = set()
        self._smaller: Point | None = None  # the largest size that was too small, and its extent
        self._larger: Point | None = None
        self._goal = math.nan

    def next(self, example: Example, mismatch: Mismatch | None) -> Example | None:
        """Return the inputs to try after these, None where there is nothing to go by."""
        shapes = {tuple(pixels.shape) for pixels in example.pixels}
        self._left -= 1
        if len(shapes) != 1 or self._left <= 0:
            return None
        (shape,) = shapes
        self._tried.add(shape)
        if mismatch is not None and mismatch.kind is not Kind.FEATURES:
            proposed = _other_channels(shape, mismatch, example.channel_axis)
        else:
            proposed = self._other_size(shape, mismatch, example.channel_axis)
        if proposed is None or proposed in self._tried:
            return None
        return reshaped(example, proposed)

    def _other_size(
        self, shape: tuple[int, ...], mismatch: Mismatch | None, axis: int
    ) -> tuple[int, ...] | None:
        if len(shape) - axis < 2:
            return None
        size = shape[-1]
        if mismatch is None:  # such as a kernel larger than what is left of the image
            if self._larger is None or size >= self._larger[0]:
                return None
            self._smaller = (size, math.nan)
            goal = self._goal
        else:
            goal = _extent(mismatch.wanted, shape, axis)
            if goal != self._goal:  # another layer's wish: what was too small for it is not known
                self._goal, self._smaller, self._larger = goal, None, None
            self._narrow((size, _extent(mismatch.got, shape, axis)), goal)
        for proposed in self._between(goal):
            # a clip keeps its length, an image or a signal its proportions
            space = tuple(proposed * s // size for s in shape[max(axis + 1, len(shape) - 2) :])
            whole = (*shape[: len(shape) - len(space)], *space)
            if whole not in self._tried:
                return whole
        return None

    def _narrow(self, point: Point, goal: float) -> None:
        if point[1] < goal:
            self._smaller = point
        else:
            self._larger = point

    def _between(self, goal: float) -> Iterator[int]:
        """Interpolate between the two sides, or scale the only one there is; round sizes first."""
        low, high = self._smaller, self._larger
        if low and high:
            slope = (high[1] - low[1]) / (high[0] - low[0])
            size = low[0] + (goal - low[1]) / slope if slope > 0 else (low[0] + high[0]) / 2
        elif low or high:
            known = low or high or (1, 1.0)
            size = known[0] * goal / known[1]
        else:
            return
        least, most = low[0] + 1 if low else 1, high[0] - 1 if high else _LARGEST
        if least <= most:
            exact = min(max(round(size), least), most)
            tidy = round(exact / _USUAL) * _USUAL
            yield from (tidy, exact) if least <= tidy <= most else (exact,)


def reshaped(example: Example, shape: tuple[int, ...]) -> Example:
    """Return the example with pixels of another shape."""
    new = {
        id(pixels): torch.empty(shape, dtype=pixels.dtype, device="meta")
        for pixels in example.pixels
    }

    def swap(tensor: Tensor) -> Tensor:
        return new.get(id(tensor), tensor)

    args, kwargs, pixels = tree_map_only(
        Tensor, swap, (example.args, dict(example.kwargs), example.pixels)
    )
    return replace(example, args=args, kwargs=kwargs, pixels=pixels)


def _extent(features: int, shape: tuple[int, ...], axis: int) -> float:
    """The side of a square of so many positions; a signal has one side."""
    return float(features) if len(shape) - axis == 2 else math.sqrt(features)


def _other_channels(
    shape: tuple[int, ...], mismatch: Mismatch, axis: int
) -> tuple[int, ...] | None:
    """Scale the channels; or the layer reads the whole image, or its channels are last."""
    channels, remainder = divmod(shape[axis] * mismatch.wanted, mismatch.got)
    if remainder == 0 and channels > 0:
        return (*shape[:axis], channels, *shape[axis + 1 :])
    if len(shape) - axis != 3:
        return None
    if mismatch.got == shape[-1]:
        return (*shape[:axis], *shape[axis + 1 :], mismatch.wanted)
    for count in dict.fromkeys((shape[axis], 3, 1)):
        side = math.isqrt(mismatch.wanted // count)
        if side * side * count == mismatch.wanted:
            return (*shape[:axis], count, side, side)
    return None
