"""Names of models and data sets, as they are shown."""

from __future__ import annotations

from pathlib import Path


def shown_name(name: str) -> str:
    """Return a model's or data set's name as results show it: of a path, the last part."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name
