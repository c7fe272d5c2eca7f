"""Every model of timm, with its variants, to audit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

_NAFLEX = ("timm.models.vision_transformer", "timm.models.eva")
"""Where ``use_naflex`` is an option."""

_BRANCHES = ("repvgg", "mobileone", "fastvit", "repvit", "repghostnet", "mobileclip", "fasternet")
"""Beginnings of the names of models whose branches can be joined for inference."""


def zoo() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield names and builders: all default models, then the variants of all."""
    import timm.models

    names = timm.models.list_models()
    for name in names:
        yield name, partial(_build, name)
    for name in names:
        if name.startswith(_BRANCHES):
            yield f"{name}[reparameterized]", partial(_joined, name)
        if timm.models.model_entrypoint(name).__module__ in _NAFLEX:
            yield f"{name}[use_naflex]", partial(_build, name, use_naflex=True)
    for name in names:
        yield f"{name}[features_only]", partial(_build, name, features_only=True)


def _build(name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, **options)
    return model


def _joined(name: str) -> nn.Module:
    from timm.utils import reparameterize_model

    joined: nn.Module = reparameterize_model(_build(name))
    return joined
