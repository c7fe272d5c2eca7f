"""The settings of one ``enable``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Scope = Literal["rank", "global"]


@dataclass(frozen=True)
class TractConfig:
    """What ``enable`` was asked for.

    Args:
        lam: damping λ of the Gram matrix, in units of the squared input, finite and positive. 0.1
            suits inputs standardised to mean 0 and deviation 1.
        scope: whose rows the Gram matrix is taken over. ``"rank"``: this process's batch.
            ``"global"``: those of all processes and of all backwards of an optimizer's step.
        rows: the share of the images that the Gram matrix is estimated from, above 0 and at most
            1, at which it is exact. Below, each 1/rows-th image of a batch counts (1/rows rounded
            down; the first one always): not the gradient of TrAct, but an estimate of it.

    Raises:
        ValueError: λ is not a finite positive number, the scope is unknown, the share is none, or
            an estimate is asked for with the scope ``"global"``.

    """

    lam: float = 0.1
    scope: Scope = "rank"
    rows: float = 1.0

    def __post_init__(self) -> None:
        if not is_finite_number(self.lam) or self.lam <= 0:
            raise ValueError(f"lam must be a finite number greater than 0, got {self.lam!r}")
        if not isinstance(self.scope, str) or self.scope not in get_args(Scope):
            raise ValueError(f"scope must be one of {get_args(Scope)}, got {self.scope!r}")
        if not is_finite_number(self.rows) or not 0 < self.rows <= 1:
            raise ValueError(f"rows must be a number above 0 and at most 1, got {self.rows!r}")
        if self.rows < 1 and self.scope == "global":
            raise ValueError(
                f"rows={self.rows:g} estimates from the batch of one process: pass scope='rank', "
                "or leave rows at 1"
            )


def is_finite_number(value: Any) -> bool:
    """Tell whether a value is an int or float that is finite as a float; a bool is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False
