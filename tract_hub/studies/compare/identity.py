"""What a run's numbers depend on, and where they came from, without any path."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from collections.abc import Mapping
from typing import Any

import torch

from tract_hub.names import shown_name
from tract_hub.studies.compare.records import FORMAT
from tract_hub.studies.images.prepared import Prepared
from tract_hub.studies.machine import device_name, versions
from tract_hub.studies.settings import CompareSettings


def identity_of(
    settings: CompareSettings, data: Prepared, size: int, start: str, accelerator: Any
) -> dict[str, Any]:
    """Return everything that runs must have in common to be compared.

    Args:
        settings: all choices; those that choose runs are left out.
        data: the images.
        size: of the model's images, in pixels.
        start: digest of the model's weights at the first seed.
        accelerator: tells device and processes.

    """
    return {
        "format": FORMAT,
        "settings": settings.of_a_run() | {"image_size": size},
        "data": data.summary(),
        "start": start,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "versions": versions(),
    }


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return eight characters that stand for an identity."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def environment(accelerator: Any) -> dict[str, Any]:
    """Return what the runs ran on."""
    return {
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def command_of(settings: CompareSettings) -> str:
    """Return a command that makes the same comparison; of paths, only the last part."""
    words = ["tract-hub", "compare", "--recipe", settings.recipe]
    words += ["--model", shown_name(settings.model), "--data", shown_name(settings.data)]
    for name, value in settings.model_args:
        words += ["--model-arg", f"{name}={value}"]
    for name in (
        "stem", "patch_norm", "classes", "image_size", "channels", "normalise", "augment",
        "max_train", "max_test", "optimizer", "lr", "momentum", "weight_decay", "stem_optimizer",
        "stem_lr", "schedule", "warmup_epochs", "label_smoothing", "epochs",
        "batch_size", "device", "precision", "threads",
    ):  # fmt: skip
        value = getattr(settings, name)
        if name == "classes" and value:
            value = ",".join(map(str, value))
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--weights", shown_name(settings.weights)] if settings.weights else []
    words += ["--channels-last"] if settings.channels_last else []
    words += ["--seeds", ",".join(map(str, settings.seeds))]
    words += ["--lam", ",".join(map(str, settings.lams)) or "none"]
    return shlex.join(words)
