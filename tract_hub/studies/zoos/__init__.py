"""Every model of a zoo: its name, and what builds it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import timm
from timm.utils import reparameterize_model
from torchvision.models import list_models

from tract_hub.studies.models import torchvision_model
from tract_hub.studies.zoos.huggingface import Builder, huggingface_models

_NAFLEX = ("timm.models.vision_transformer", "timm.models.eva")
"""Where ``use_naflex`` is an option."""
_BRANCHES = ("repvgg", "mobileone", "fastvit", "repvit", "repghostnet", "mobileclip", "fasternet")
"""Beginnings of the names of models whose branches can be joined for inference."""


@cache
def models_of(zoo: str) -> dict[str, Builder]:
    """Return names and builders of ``"timm"``, ``"torchvision"`` or ``"huggingface"``."""
    if zoo == "torchvision":
        return {name: partial(torchvision_model, name) for name in list_models()}
    return dict(huggingface_models() if zoo == "huggingface" else _timm_models())


def _timm_models() -> Iterator[tuple[str, Builder]]:
    """Yield all default models, then the variants of all."""
    names = timm.list_models()
    for name in names:
        yield name, partial(timm.create_model, name)
    for name in names:
        if name.startswith(_BRANCHES):
            yield f"{name}[reparameterized]", partial(_joined, name)
        if timm.models.model_entrypoint(name).__module__ in _NAFLEX:
            yield f"{name}[use_naflex]", partial(timm.create_model, name, use_naflex=True)
    for name in names:
        yield f"{name}[features_only]", partial(timm.create_model, name, features_only=True)


def _joined(name: str) -> Any:
    return reparameterize_model(timm.create_model(name))
