"""What results were made with: devices, and the versions of packages."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import tract_hub

PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "datasets")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python, this package and others, of those installed."""
    found = {"python": platform.python_version(), "tract-hub": tract_hub.__version__}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> str:
    """Return the GPU, or else the CPU, the threads and the versions in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name()]
    packages = ", ".join(f"{name} {at}" for name, at in versions().items())
    processor = names[0] if names else platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads; {packages}"
