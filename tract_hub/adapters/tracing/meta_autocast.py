"""``torch.autocast(x.device.type)``, as models write it, for an ``x`` on the meta device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_patching = threading.RLock()  # two threads would restore each other's patch


@contextmanager
def meta_autocast() -> Iterator[None]:
    """Take the meta device for the CPU where a model asks for autocast, which torch refuses."""
    with _patching:
        original = torch.amp.autocast.__init__

        def init(self: torch.amp.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
            original(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

        torch.amp.autocast.__init__ = init  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.amp.autocast.__init__ = original  # type: ignore[method-assign]
