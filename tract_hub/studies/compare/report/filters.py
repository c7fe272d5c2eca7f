"""First-layer filters as they develop: one picture an arm, a snapshot a line."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tract_hub.studies.compare.aggregate import Comparison
from tract_hub.studies.compare.plots import filter_images, shown_run
from tract_hub.studies.compare.records import Filters, RunRecord

# Small filters are enlarged to about so many pixels, so that browsers have little to smooth.
LEAST_SIDE = 16


@dataclass(frozen=True)
class Strip:
    """The filters of one arm.

    Args:
        arm: its name.
        seed: of the run they are of; None where every run diverged.
        weight: the layer's name.
        epochs: one a line of the picture.
        picture: a PNG as a data address.
        shape: pixels of the picture, width and height.
        filters: in a line.

    """

    arm: str
    seed: int | None
    weight: str = ""
    epochs: tuple[int, ...] = ()
    picture: str = ""
    shape: tuple[int, int] = (0, 0)
    filters: int = 0


def strips(comparison: Comparison, runs: Sequence[RunRecord]) -> list[Strip]:
    """Return one strip for every arm, all of the same filters where an arm has any."""
    shown = [(str(arm.arm), shown_run(arm, runs)) for arm in comparison.arms]
    return [Strip(arm, None) if run is None else _strip(arm, run) for arm, run in shown]


def _strip(arm: str, run: RunRecord) -> Strip:
    pixels = strip_pixels(run.filters)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    height, width, _ = pixels.shape
    kept = run.filters
    return Strip(arm, run.seed, kept.weight, kept.epochs, address, (width, height), len(kept.rows))


def strip_pixels(filters: Filters) -> NDArray[np.uint8]:
    """Return snapshots × filters side by side as RGBA: between them, nothing."""
    lines = [[_tile(image) for image in filter_images(rows)] for rows in filters.values]
    scale = max(1, -(-LEAST_SIDE // lines[0][0].shape[0]))
    gap = max(1, lines[0][0].shape[0] * scale // 8)
    return np.concatenate(
        [np.concatenate([_enlarged(tile, scale, gap) for tile in line], 1) for line in lines]
    )


def _tile(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a picture in [0, 1] as RGBA; what is no number is left out."""
    colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    known = np.isfinite(colour).all(axis=2, keepdims=True)
    whole = np.concatenate([np.where(known, colour, 0.0), known], axis=2)
    pixels: NDArray[np.uint8] = np.rint(whole * 255).astype(np.uint8)
    return pixels


def _enlarged(tile: NDArray[np.uint8], scale: int, gap: int) -> NDArray[np.uint8]:
    large = tile.repeat(scale, axis=0).repeat(scale, axis=1)
    padded: NDArray[np.uint8] = np.pad(large, ((0, gap), (0, gap), (0, 0)))
    return padded
