"""Names that users give: how they are shown, and the nearest to one that nothing has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

MOST = 12
"""Names in a list of what there is, no fewer than there are recipes."""


def shown_name(name: str) -> str:
    """Return a model's or data set's name as results show it: of a path, the last part."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean a, b or c?"``, or a list of what there is when nothing is near.

    Args:
        name: what was asked for.
        known: the names that exist.

    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    if near:
        return f"did you mean {_either(near)}?"
    few = ", ".join(names[:MOST]) or "none"
    return f"there is {few}" + (" …" if len(names) > MOST else "")


def _either(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} or {names[-1]}"
