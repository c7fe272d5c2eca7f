"""Some filters of the first layer, kept a few times while a run trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tract_hub.studies.compare.records import Filters

FILTERS_KEPT = 16
MOST_SNAPSHOTS = 12
# A run's file stays below a megabyte: filters of large patches are kept less often.
MOST_NUMBERS = 100_000


class Snapshots:
    """Keeps filters at the start, at the end, and evenly in between.

    Args:
        name: of the first layer's weight.
        weight: gives it as it is now, (out, ...).
        epochs: that the run will take.

    """

    def __init__(self, name: str, weight: Callable[[], Tensor], epochs: int) -> None:
        self.name = name
        self.weight = weight
        start = weight()
        count = min(FILTERS_KEPT, len(start))
        self.rows = tuple(i * len(start) // count for i in range(count))
        self.wanted = snapshot_epochs(epochs, count * start[0].numel())
        self.values: dict[int, list[Any]] = {}
        self._keep(0)

    def after(self, epoch: int, last: bool = False) -> None:
        """Keep the filters where this epoch's are wanted, or where no later one's will come."""
        if last or epoch in self.wanted:
            self._keep(epoch)

    def _keep(self, epoch: int) -> None:
        weight = self.weight().detach()[list(self.rows)].float().cpu()
        self.values[epoch] = [_rounded(row.tolist()) for row in weight]

    def filters(self) -> Filters:
        """Return what was kept."""
        return Filters(self.name, self.rows, tuple(self.values), list(self.values.values()))


def snapshot_epochs(epochs: int, numbers: int) -> tuple[int, ...]:
    """Return after which epochs filters are kept; 0 is the start.

    Args:
        epochs: that a run takes.
        numbers: in one snapshot.

    """
    most = min(MOST_SNAPSHOTS, MOST_NUMBERS // numbers, epochs + 1)
    last = max(2, most) - 1
    return tuple(round(i * epochs / last) for i in range(last + 1))


def _rounded(values: Any) -> Any:
    """Keep five digits: a picture shows no more."""
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.5g}") if math.isfinite(values) else math.nan
