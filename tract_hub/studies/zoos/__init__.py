"""Every model of a zoo: its name, and what builds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from torch import nn

from tract_hub.studies.models import torchvision_model

Builder = Callable[[], nn.Module]
_NAFLEX = ("timm.models.vision_transformer", "timm.models.eva")
"""Where ``use_naflex`` is an option."""
_BRANCHES = ("repvgg", "mobileone", "fastvit", "repvit", "repghostnet", "mobileclip", "fasternet")
"""Beginnings of the names of models whose branches can be joined for inference."""


@cache
def models_of(zoo: str) -> dict[str, Builder]:
    """Return names and builders of ``"timm"``, ``"torchvision"`` or ``"huggingface"``."""
    if zoo == "torchvision":
        from torchvision.models import list_models

        return {name: partial(torchvision_model, name) for name in list_models()}
    if zoo == "huggingface":
        from tract_hub.studies.zoos.huggingface import models

        return dict(models())
    return dict(_timm_models())


def _timm_models() -> Iterator[tuple[str, Builder]]:
    """Yield all default models, then the variants of all."""
    import timm.models

    names = timm.models.list_models()
    for name in names:
        yield name, partial(_timm, name)
    for name in names:
        if name.startswith(_BRANCHES):
            yield f"{name}[reparameterized]", partial(_joined, name)
        if timm.models.model_entrypoint(name).__module__ in _NAFLEX:
            yield f"{name}[use_naflex]", partial(_timm, name, use_naflex=True)
    for name in names:
        yield f"{name}[features_only]", partial(_timm, name, features_only=True)


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, **options)
    return model


def _joined(name: str) -> nn.Module:
    from timm.utils import reparameterize_model

    joined: nn.Module = reparameterize_model(_timm(name))
    return joined
