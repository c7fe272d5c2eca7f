"""Named starting points of a comparison; every value can be overridden by an option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tract_hub.errors import SettingsError
from tract_hub.names import did_you_mean
from tract_hub.studies.settings import CompareSettings

Values = Mapping[str, Any]
"""Fields of ``CompareSettings``, by name."""

CIFAR: Values = {
    "data": "uoft-cs/cifar10",
    "image_size": 32,
    "augment": "crop-flip",
    "batch_size": 128,
    "epochs": 100,
    "seeds": (0, 1, 2, 3, 4),
}
# The paper's ResNet-18 on CIFAR-10: 3 × 3 stride-1 stem, max-pool kept.
RESNET: Values = {
    **CIFAR,
    "model": "resnet18",
    "stem": "cifar",
    # The paper's figures state no weight decay for these settings; 5e-4 is the custom for SGD.
    "weight_decay": 5e-4,
    "optimizer": "sgd",
    "lr": 0.08,
    "momentum": 0.9,
}
BY_ADAM: Values = {"optimizer": "adam", "lr": 1e-2, "weight_decay": 0.0}
# The paper's ViT on CIFAR-10.
VIT: Values = {
    **CIFAR,
    "model": "vit_tiny_patch16_224",
    "model_args": (("patch_size", 4), ("embed_dim", 384), ("depth", 7), ("num_heads", 12)),
    "label_smoothing": 0.1,
    "optimizer": "adam",
    "lr": 1e-3,
}
SMALL_VIT = (("patch_size", 4), ("embed_dim", 64), ("depth", 4), ("num_heads", 4))
# What a CPU trains in a minute or two; images in proportion.
NARROW: Values = {
    "max_train": 5000,
    "max_test": 3000,
    "batch_size": 64,
    "epochs": 10,
    "seeds": (0, 1, 2),
    "threads": 1,
}
NARROW_RESNET: Values = {
    **RESNET,
    **NARROW,
    "model_args": (("channels", (16, 32, 64, 128)),),
    "channels_last": True,
    # The best of ordinary training: docs/results/studies/learning-rate.
    "lr": 0.32,
}
DIGITS_VIT: Values = {
    "model": "vit_tiny_patch16_224",
    "model_args": SMALL_VIT,
    "data": "digits",
    "image_size": 16,
    "optimizer": "adam",
    # The best of ordinary training: docs/results/studies/default-learning-rate.
    "lr": 3e-3,
    "epochs": 15,
    "batch_size": 64,
    "seeds": (0, 1, 2),
    "threads": 1,  # so small a model only waits for more of them
}

RECIPES: dict[str, Values] = {
    "digits-vit": DIGITS_VIT,
    "cifar-resnet": RESNET,
    "cifar-resnet-adam": {**RESNET, **BY_ADAM},
    "cifar-vit": VIT,
    "narrow-resnet": NARROW_RESNET,
    "narrow-resnet-adam": {**NARROW_RESNET, **BY_ADAM},
    "narrow-vit": {**VIT, **NARROW, "model_args": SMALL_VIT},
    "lambda-sweep": {**RESNET, "lams": (0.0125, 0.05, 0.1, 0.2, 0.8)},
    "unstandardised": {**RESNET, "normalise": "bytes"},
    "dual-patch-norm": {**VIT, "patch_norm": "dual"},
    "sgd-stem": {**VIT, "stem_optimizer": "sgd"},
}


def build_settings(recipe: str, overrides: Mapping[str, Any]) -> CompareSettings:
    """Return a recipe's settings with a user's own values on top.

    Another model drops the recipe's model arguments and threads, another model or data set its
    image size: these belong to what was replaced. Everything else stays the recipe's.

    Args:
        recipe: a key of ``RECIPES``.
        overrides: fields of ``CompareSettings``; None means not given.

    Raises:
        SettingsError: no such recipe, or a value that makes no sense.

    """
    if recipe not in RECIPES:
        raise SettingsError(f"no recipe {recipe!r}; {did_you_mean(recipe, RECIPES)}")
    values = dict(RECIPES[recipe])
    given = {name: value for name, value in overrides.items() if value is not None}
    new_model = given.get("model", values["model"]) != values["model"]
    new_data = given.get("data", values["data"]) != values["data"]
    if new_model:
        values.pop("model_args", None)
        values.pop("threads", None)
    if new_model or (new_data and values["data"] == "digits"):
        values.pop("image_size", None)
    given["model_args"] = _merged(values.get("model_args", ()), given.get("model_args", ()))
    return CompareSettings(**{"recipe": recipe, **values, **given})


def _merged(
    first: tuple[tuple[str, Any], ...], second: tuple[tuple[str, Any], ...]
) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted({**dict(first), **dict(second)}.items()))
