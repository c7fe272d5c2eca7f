"""TrAct for the first layer of every published vision model.

    model = tract_hub.enable(timm.create_model("vit_small_patch16_224"))

``enable`` finds the layers that read the pixels and gives them the TrAct gradient (Petersen,
Borgelt, Ermon, NeurIPS 2024); ``disable`` removes it. ``locate`` lists the layers that it would
apply to, ``status`` those that it is applied to.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tract_hub.errors import (
    ExampleInputError,
    StemNotFoundError,
    TractError,
    TractWarning,
    UnsupportedStemError,
)

if TYPE_CHECKING:
    from tract_hub.attach import Status, StemStatus, disable, enable, finish, status
    from tract_hub.integrations.figures import measure
    from tract_hub.integrations.trainer import TractCallback, optimizer_factory
    from tract_hub.locator.locate import locate
    from tract_hub.stem import Stem

__version__ = "0.2.0"

__all__ = [
    "ExampleInputError",
    "Status",
    "Stem",
    "StemNotFoundError",
    "StemStatus",
    "TractCallback",
    "TractError",
    "TractWarning",
    "UnsupportedStemError",
    "disable",
    "enable",
    "finish",
    "locate",
    "measure",
    "optimizer_factory",
    "status",
]


_LATER = {
    "Status": "attach",
    "Stem": "stem",
    "StemStatus": "attach",
    "TractCallback": "integrations.trainer",
    "disable": "attach",
    "enable": "attach",
    "finish": "attach",
    "locate": "locator.locate",
    "measure": "integrations.figures",
    "optimizer_factory": "integrations.trainer",
    "restore_stand_in": "method.forward",  # pickles of enabled models ask for it
    "status": "attach",
}
"""What needs torch, or transformers too → the module it is imported from when it is asked for."""

_AUTHORS_NAMES = ("TrAct", "TrActLinear", "TrActConv2d")


def __getattr__(name: str) -> Any:
    if name in _AUTHORS_NAMES:
        raise AttributeError(
            f"tract_hub has no layer class {name!r}, as torch_tract has: pass the whole model to "
            "tract_hub.enable(model, lam=0.1)"
        )
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
