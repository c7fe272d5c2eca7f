"""Every model of torchvision, to audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from tract_hub.studies.models.torchvision import torchvision_builders


def zoo() -> Iterable[tuple[str, Callable[[], nn.Module]]]:
    """Return names and builders."""
    return torchvision_builders().items()
