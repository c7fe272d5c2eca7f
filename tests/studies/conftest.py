"""Small image folders, and one small comparison that several tests read."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tract_hub.studies.compare import compare
from tract_hub.studies.settings import RECIPES

SMALL = replace(
    RECIPES["digits"],
    image_size=8,
    max_train=256,
    max_test=200,
    epochs=(2,),
    lr=(0.2,),
    seeds=3,
    device="cpu",
)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a small comparison."""
    folder = tmp_path_factory.mktemp("small")
    compare(replace(SMALL, out=folder))
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """Write images of classes in given modes and numbers; returns the folder."""

    def write(modes=("RGB",), classes=(8, 8), size=16):
        rng = np.random.default_rng(0)
        for split in ("train", "test"):
            for label, count in enumerate(classes):
                folder = tmp_path / "images" / split / f"class{label}"
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(60 * label, 60 * label + 60, (size, size, 3))
                    image = Image.fromarray(pixels.astype(np.uint8)).convert(modes[i % len(modes)])
                    image.save(folder / f"{i}.png" if image.mode != "CMYK" else folder / f"{i}.jpg")
        return tmp_path / "images"

    return write
