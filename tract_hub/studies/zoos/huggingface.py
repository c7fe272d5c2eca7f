"""Every model type of Transformers that takes images or video, built without a download."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.models.auto import modeling_auto

from tract_hub.locator.zoos.huggingface import takes_pixels

LACKING: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)
"""Model type → settings without which its default config describes no working model."""

Builder = Callable[[], nn.Module]


def huggingface_models() -> Iterator[tuple[str, Builder]]:
    """Yield the name of each model type that takes pixels, and what builds its first such class."""
    for model_type, names in _auto_classes().items():
        for name in names:
            cls = _class_named(name)
            if cls is not None and takes_pixels(cls):
                yield f"{model_type}/{name}", partial(build, cls)
                break


def build(cls: Any) -> nn.Module:
    """Build a model with its class's default config; its parameters take no memory."""
    try:
        with init_empty_weights():  # buffers keep their values, as in a model in use
            model: nn.Module = cls(_config(cls))
    except RuntimeError:  # a single parameter too large to be allocated even once
        with torch.device("meta"):
            model = cls(_config(cls))
    return model.eval()


def _auto_classes() -> dict[str, list[str]]:
    """Model type → the names of its classes, the base model first."""
    found: dict[str, dict[str, None]] = {}
    for mapping, table in vars(modeling_auto).items():
        if not (mapping.startswith("MODEL_") and mapping.endswith("MAPPING_NAMES")):
            continue
        for model_type, names in table.items():
            names = names if isinstance(names, (tuple, list)) else (names,)
            found.setdefault(model_type, {}).update(dict.fromkeys(names))
    return {model_type: list(names) for model_type, names in found.items()}


def _class_named(name: str) -> Any:
    """A class of Transformers; None where a library that it needs is not installed."""
    cls = getattr(transformers, name, None)
    try:
        return cls if inspect.isfunction(getattr(cls, "forward", None)) else None
    except ImportError:
        return None


def _config(cls: Any) -> Any:
    """The default config of a class, with what it lacks to build or to run."""
    kind = cls.config_class.model_type
    if kind == "vision-encoder-decoder":
        pair = (transformers.CONFIG_MAPPING[part]() for part in ("vit", "gpt2"))
        return cls.config_class.from_encoder_decoder_configs(*pair)
    return cls.config_class(**LACKING.get(kind, {}))
