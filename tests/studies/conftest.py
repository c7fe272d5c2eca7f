from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no cache from another day, no run folder in the checkout."""
    import datasets

    from tract_hub.studies.compare import timing

    cache = tmp_path_factory.mktemp("datasets-cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # Two steps tell as much about the command as sixty.
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 2)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (12, 12)) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """Accelerate keeps one device and precision a process, and a test is a process of its own."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of folders CLASS/number.png."""

    def make(
        classes: str = "cat dog",
        count: int = 20,
        mode: str = "RGB",
        under: str = "",
        size: tuple[int, int] = (12, 12),
    ) -> Path:
        for k, name in enumerate(classes.split()):
            folder = tmp_path / "images" / under / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture(1000 * k + i, mode, size).save(folder / f"{i}.png")
        return tmp_path / "images"

    return make


@pytest.fixture
def tract_hub_process() -> Callable[..., subprocess.Popen[str]]:
    """Return a starter of real ``tract-hub`` processes."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tract_hub", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
