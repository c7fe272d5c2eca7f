"""How rough the half-precision sums of a layer's input are, looked at now and then.

On a GPU a look waits for the device, so it is taken at a layer's first batches, which may be made
up to warm up, and then once in a long while.
"""

from __future__ import annotations

import functools

from torch import Tensor

FIRST = 3
"""Batches of a layer that are looked at to begin with."""

EVERY = 1000
"""Batches from one later look to the next."""


class Sight:
    """What was seen of one layer.

    Attributes:
        rounding: the largest rounding error of its Gram matrices, as an eigenvalue; None before a
            batch was seen that is neither zero nor beyond all numbers.

    """

    def __init__(self) -> None:
        self.rounding: float | None = None
        self._batches = 0

    def is_due(self) -> bool:
        """Count a batch; tell whether to look at it."""
        self._batches += 1
        return self.rounding is None or self._batches <= FIRST or self._batches % EVERY == 0

    def see(self, rounding: Tensor) -> None:
        """Remember the rounding errors of a batch. Waits for the device."""
        worst = float(rounding.max())
        if 0 < worst < float("inf"):
            self.rounding = max(self.rounding or 0.0, worst)


@functools.cache
def sight_of(site: str) -> Sight:
    """Return what was seen of a layer, by what it is remembered by."""
    return Sight()
