"""From a stored image to a tensor, refusing what would lose something unasked."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tract_hub.errors import DataError

NAMES = {1: "L", 3: "RGB"}
LOSSLESS = {("1", 1), ("L", 1), ("1", 3), ("L", 3), ("P", 3), ("RGB", 3)}
# Pillow clips deeper pixels to 8 bits without a word, so no option converts those.
CONVERTIBLE = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"}


@dataclass(frozen=True)
class Kind:
    """What every image of a data set is turned into.

    Args:
        channels: 1 (grey) or 3 (RGB).
        lossy: whether dropping colours or transparency was asked for.

    """

    channels: int
    lossy: bool = False


def pixels(entry: dict[str, Any], kind: Kind, which: str) -> Tensor:
    """Decode one image to uint8, channels × height × width.

    Args:
        entry: its ``bytes``, or the ``path`` to it.
        kind: the channels to give.
        which: how a message calls it.

    Raises:
        DataError: it cannot be read, or has other channels than the data set.

    """
    from torchvision.transforms.v2 import functional

    image = open_image(entry, which)
    if (image.mode, kind.channels) not in LOSSLESS:
        _check_convertible(image.mode, kind, which)
    tensor: Tensor = functional.pil_to_tensor(image.convert(NAMES[kind.channels]))
    return tensor


def open_image(entry: dict[str, Any], which: str) -> Any:
    """Return one image as Pillow sees it; arguments and errors as for :func:`pixels`."""
    from PIL import Image

    path = entry.get("path")
    named = f"{which} ({path})" if path else which
    try:
        data = entry.get("bytes")
        image = Image.open(io.BytesIO(data) if data is not None else str(path))
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{named} cannot be read; remove or repair it") from error
    return image


def _check_convertible(mode: str, kind: Kind, which: str) -> None:
    if mode not in CONVERTIBLE:
        raise DataError(f"{which} has {mode} pixels; convert the images to 8-bit grey or RGB")
    if not kind.lossy:
        raise DataError(
            f"{which} has the channels {mode}, where {NAMES[kind.channels]} was expected; "
            "make all images of one kind, or convert them with --channels 1 or 3"
        )
