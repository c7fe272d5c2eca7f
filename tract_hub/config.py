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

    Raises:
        ValueError: λ is not a finite positive number, or the scope is unknown.

    """

    lam: float = 0.1
    scope: Scope = "rank"

    def __post_init__(self) -> None:
        if not is_finite_number(self.lam) or self.lam <= 0:
            raise ValueError(f"lam must be a finite number greater than 0, got {self.lam!r}")
        if not isinstance(self.scope, str) or self.scope not in get_args(Scope):
            raise ValueError(f"scope must be one of {get_args(Scope)}, got {self.scope!r}")


def is_finite_number(value: Any) -> bool:
    """Tell whether a value is an int or float that is finite as a float; a bool is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False
