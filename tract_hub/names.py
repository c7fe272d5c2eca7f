"""The nearest to a name that nothing has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ``"did you mean a, b or c?"``, or a list of what there is when nothing is near.

    Args:
        name: what was asked for.
        known: the names that exist.
        count: how many to offer at most.

    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=count, cutoff=0.4)
    if near:
        return f"did you mean {_either(near)}?"
    few = ", ".join(names[:8]) or "none"
    return f"there is {few}" + (" …" if len(names) > 8 else "")


def _either(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} or {names[-1]}"
