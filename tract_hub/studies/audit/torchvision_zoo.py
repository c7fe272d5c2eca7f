"""Every model of torchvision, to audit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn


def zoo() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield names and builders, without pretrained weights; quantizable models in float."""
    from torchvision.models import list_models

    for name in list_models():
        yield name, partial(_build, name)


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
