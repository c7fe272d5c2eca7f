"""The settings of one ``enable``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Scope = Literal["local", "global"]
Damping = Literal["absolute", "relative"]


@dataclass(frozen=True)
class Settings:
    """How the gradient of one first layer is corrected.

    Args:
        lam: the damping λ, finite and positive; in units of the squared input, or of the input's
            mean square where the damping is relative.
        scope: whose rows the Gram matrix is taken over. ``"local"``: the batch of this process and
            this backward. ``"global"``: all processes and all backwards of an optimizer's step.
        damping: ``"absolute"``, λI as in the paper; ``"relative"``, λ · (trace / n) I, which does
            not depend on the units of the pixels.

    Raises:
        ValueError: a value is none of these.

    """

    lam: float = 0.1
    scope: Scope = "local"
    damping: Damping = "absolute"

    def __post_init__(self) -> None:
        if not _is_finite_number(self.lam) or self.lam <= 0:
            raise ValueError(f"lam must be a finite number greater than 0, got {self.lam!r}")
        for name, allowed in (("scope", get_args(Scope)), ("damping", get_args(Damping))):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def _is_finite_number(value: Any) -> bool:
    """Tell whether a value is an int or float that is finite as a float; a bool is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False
