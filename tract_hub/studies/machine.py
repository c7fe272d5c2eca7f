"""What a study runs on: devices, and the versions of packages."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from tract_hub.errors import SettingsError

PACKAGES = ("tract-hub", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets")
_MISSING = "not installed"


def check_there(name: str) -> None:
    """Refuse a device that is not here.

    Raises:
        SettingsError: it is not; the message lists those that are.

    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise SettingsError(f"no device {name!r} here; there is {', '.join(there)}") from error


def device_name(device: torch.device) -> str:
    """Return the kind of a device, and its model or architecture."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"


def versions() -> dict[str, str]:
    """Return the versions that results may depend on; of some, that they are not installed."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _MISSING


def in_words(versions: Mapping[str, str]) -> str:
    """List the versions of what is installed."""
    return ", ".join(f"{name} {at}" for name, at in versions.items() if at != _MISSING)
