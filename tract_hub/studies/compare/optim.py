"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tract_hub.errors import SettingsError, first_line
from tract_hub.integrations.trainer.stem_group import StemGroup, StemOptimizer
from tract_hub.names import did_you_mean
from tract_hub.stem import Stem
from tract_hub.studies.settings import CompareSettings

TORCH_OPTIMIZERS = ("adam", "adamw", "sgd")


def check_optimizer(settings: CompareSettings) -> None:
    """Raise a SettingsError when no optimizer has this name, or it has no momentum to be set."""
    _check_name(settings.optimizer)
    takes_momentum = has_momentum(settings.optimizer) or settings.stem_optimizer != "same"
    if settings.momentum != CompareSettings.momentum and not takes_momentum:
        raise SettingsError(f"{settings.optimizer} has no momentum: leave --momentum out")


def _check_name(name: str) -> None:
    from timm.optim import list_optimizers

    known = {*TORCH_OPTIMIZERS, *list_optimizers()}
    if name.lower() not in known:
        raise SettingsError(f"no optimizer {name!r}; {did_you_mean(name.lower(), known)}")


def has_momentum(name: str) -> bool:
    """Tell whether an optimizer of this name takes a momentum; others leave it out."""
    from timm.optim import get_optimizer_info

    return bool(get_optimizer_info(name.lower()).has_momentum)


def make_optimizer(
    model: nn.Module, settings: CompareSettings, stems: Sequence[Stem] = ()
) -> torch.optim.Optimizer:
    """Return one optimizer for all parameters, even where the first layers have their own.

    Args:
        model: its parameters.
        settings: name, learning rate, momentum and weight decay.
        stems: its first layers.

    Raises:
        SettingsError: no such optimizer, or it cannot be made.

    """
    own = StemGroup(settings.stem_lr, None, _stem_optimizer(settings))
    weights = [model.get_parameter(stem.weight_name) for stem in stems]
    return own.separate(_of_all(model, settings), weights)


def _stem_optimizer(settings: CompareSettings) -> StemOptimizer | None:
    if settings.stem_optimizer == "same":
        return None
    return torch.optim.SGD, {"momentum": settings.momentum}


def _of_all(model: nn.Module, settings: CompareSettings) -> torch.optim.Optimizer:
    """Return one optimizer with the same settings for all parameters.

    ``adam``, ``adamw`` and ``sgd`` (plain momentum) are those of ``torch.optim`` with weight decay
    on every parameter; other names are timm's, which leaves biases and norms undecayed.
    """
    name = settings.optimizer.lower()
    _check_name(name)
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    parameters = list(model.parameters())
    if name == "adam":
        return torch.optim.Adam(parameters, **common)
    if name == "adamw":
        return torch.optim.AdamW(parameters, **common)
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, **common)
    return _timm_optimizer(model, settings)


def _timm_optimizer(model: nn.Module, settings: CompareSettings) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=settings.optimizer.lower(),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
        )
    except Exception as error:  # some of timm's optimizers need packages that may be missing
        raise SettingsError(
            f"optimizer {settings.optimizer} cannot be made ({first_line(error)}): "
            "pass another --optimizer"
        ) from error
    return optimizer


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: CompareSettings, steps_per_epoch: int
) -> Any:
    """Return the learning-rate schedule, to be stepped after every optimizer step.

    Args:
        optimizer: whose learning rates it sets.
        settings: schedule, warm-up and epochs.
        steps_per_epoch: optimizer steps in an epoch.

    """
    from transformers import get_scheduler

    return get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=round(settings.warmup_epochs * steps_per_epoch),
        num_training_steps=settings.epochs * steps_per_epoch,
    )
