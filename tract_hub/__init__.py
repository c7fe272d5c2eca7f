"""TrAct for the first layer of every published vision model.

    model = tract_hub.enable(timm.create_model("vit_small_patch16_224"))

``enable`` finds the layers that read the pixels and gives them the exact TrAct gradient
(Petersen, Borgelt, Ermon, NeurIPS 2024); ``disable`` takes it off, ``locate`` and ``status`` say
what it would be and is on.
"""

from tract_hub.adapters.locator import locate
from tract_hub.config import TractConfig
from tract_hub.errors import (
    ExampleInputError,
    StemNotFoundError,
    TractError,
    TractWarning,
    UnsupportedStemError,
)
from tract_hub.stem import Stem
from tract_hub.surgery import StemStatus, disable, enable, status

__all__ = [
    "ExampleInputError",
    "Stem",
    "StemNotFoundError",
    "StemStatus",
    "TractConfig",
    "TractError",
    "TractWarning",
    "UnsupportedStemError",
    "disable",
    "enable",
    "locate",
    "status",
]
