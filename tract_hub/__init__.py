"""TrAct for the first layer of every published vision model.

    model = tract_hub.enable(timm.create_model("vit_small_patch16_224"))

``enable`` finds the layers that read the pixels and gives them the exact TrAct gradient
(Petersen, Borgelt, Ermon, NeurIPS 2024); ``disable`` takes it off, ``locate`` and ``status`` say
what it would be and is on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tract_hub.config import TractConfig
from tract_hub.errors import (
    ExampleInputError,
    StemNotFoundError,
    TractError,
    TractWarning,
    UnsupportedStemError,
)

if TYPE_CHECKING:
    from tract_hub.integrations.trainer.callback import TractCallback
    from tract_hub.integrations.trainer.factory import optimizer_factory
    from tract_hub.locator.locate import locate
    from tract_hub.stem import Stem
    from tract_hub.surgery import StemStatus, disable, enable, status

__all__ = [
    "ExampleInputError",
    "Stem",
    "StemNotFoundError",
    "StemStatus",
    "TractCallback",
    "TractConfig",
    "TractError",
    "TractWarning",
    "UnsupportedStemError",
    "disable",
    "enable",
    "locate",
    "optimizer_factory",
    "status",
]


_LATER = {
    "Stem": "stem",
    "StemStatus": "surgery",
    "TractCallback": "integrations.trainer.callback",
    "disable": "surgery",
    "enable": "surgery",
    "locate": "locator.locate",
    "optimizer_factory": "integrations.trainer.factory",
    "status": "surgery",
}
"""What needs torch, or transformers too → the module it is imported from when it is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
