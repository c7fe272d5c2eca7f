"""torchvision's models, built without pretrained weights; quantizable ones in float."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def torchvision_builders() -> dict[str, Callable[[], nn.Module]]:
    """Return what builds each model of torchvision, by its name there."""
    from torchvision.models import list_models

    return {name: partial(_build, name) for name in list_models()}


def _build(name: str) -> nn.Module:
    from torchvision.models import get_model_builder

    builder = get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    options: dict[str, Any] = {
        option: None for option in ("weights", "weights_backbone") if option in accepted
    }
    if "quantize" in accepted:
        options["quantize"] = False
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # their own default warns
    model: nn.Module = builder(**options)
    return model
