"""The nearest names to one that nothing has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_SHOWN = 12


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean a, b or c?"``, or a list of what there is when nothing is near.

    Args:
        name: what was asked for.
        known: the names that exist.

    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    if near:
        *others, last = near
        return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"
    few = ", ".join(names[:MOST_SHOWN]) or "none"
    return f"there is {few}" + (" …" if len(names) > MOST_SHOWN else "")
