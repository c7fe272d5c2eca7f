"""How Transformers models have their pixels laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product

from tract_hub.locator.zoos.hf_config import ImageSizes

_CUBES = "cubes, channels last"

LAYOUTS: Mapping[str, Callable[[ImageSizes], tuple[int, ...]]] = {
    "image": lambda s: (1, s.channels, s.height, s.width),
    "half image": lambda s: (1, s.channels, s.height // 2, s.width),
    "frames": lambda s: (1, s.frames, s.channels, s.height, s.width),
    "channels before frames": lambda s: (1, s.channels, s.frames, s.height, s.width),
    "pair": lambda s: (1, 2, s.channels, s.height, s.width),
    "one of several": lambda s: (1, 1, s.channels, s.height, s.width),
    "one camera of several": lambda s: (1, 1, s.channels, s.height, s.width),
    "several videos": lambda s: (1, 1, s.frames, s.channels, s.height, s.width),
    "tiles": lambda s: (1, 1, s.tiles, s.channels, s.height, s.width),
    _CUBES: lambda s: (1, s.frames_per_patch, s.patch, s.patch, s.channels),
    "patches": lambda s: (s.patches, s.patch_features),
    "padded patches": lambda s: (1, s.patches, s.patch_features),
    "patches of one image": lambda s: (
        1,
        (s.height // s.patch) * (s.width // s.patch),
        s.patch_features,
    ),
    "padded merged patches": lambda s: (1, s.patches, s.patch_features * s.merge**2),
    "square patches": lambda s: (s.patches, s.channels, s.patch, s.patch),
    "padded square patches": lambda s: (1, s.patches, s.channels, s.patch, s.patch),
    "cube patches": lambda s: (s.patches, s.channels, s.frames_per_patch, s.patch, s.patch),
    "strip of patches": lambda s: (1, s.channels, s.patch, s.patches * s.patch),
    "merged patches": lambda s: (
        s.patches // s.merge**2,
        s.merge * s.patch,
        s.merge * s.patch,
        s.channels,
    ),
    "placed patches": lambda s: (1, s.patches, 2 + s.patch_features),
    "pair of surroundings": lambda s: (1, 2, s.channels * 3**2, s.height, s.width),
    "mel × time": lambda s: (1, s.mels, s.sound),
    "time × mel": lambda s: (1, s.sound, s.mels),
    "one channel of time × mel": lambda s: (1, 1, s.sound, s.mels),
    "wave": lambda s: (1, 16_000),
    "one channel of a wave": lambda s: (1, 1, 16_000),
}
"""Name of a layout → the shape of pixels of these sizes."""

_PACKED = (
    "patches",
    "square patches",
    "padded square patches",
    "cube patches",
    "padded patches",
    "merged patches",
)

_IMAGES = (
    ("input_features", ("mel × time", "time × mel", "one channel of time × mel")),
    ("input_values", ("time × mel", "wave", "one channel of a wave")),
    ("flattened_patches", ("placed patches", "image")),
    ("token_pooling", ("patches of one image",)),
    ("grid", (*_PACKED, "image")),
    ("target_sizes", ("strip of patches", "image")),
    ("spatial_shapes", ("padded patches", "image")),
    ("pixel_position_ids", ("padded patches", "padded merged patches", "image")),
    ("image_position_ids", ("padded patches", "padded merged patches", "image")),
    ("image_patches", ("padded patches",)),
    ("prompt_pixel_values", ("half image", "image")),
    ("pixel_attention_mask", ("one of several", "image", "one camera of several")),
    ("inputs", ("image", "pair of surroundings")),
)
"""Part of a parameter's name → the layouts that it hints at."""

_USUAL = ("image", "frames", "one of several", "pair", "channels before frames", "tiles")
_VIDEOS = (
    "frames",
    "channels before frames",
    "several videos",
    "padded patches",
    "padded merged patches",
    "patches of one image",
)


def layout_pairs(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield layouts of images and of videos that fit a forward's inputs, the likeliest first."""
    names = list(names)
    images = _image_layouts(" ".join(names))
    if any("video" in name and "pixel" in name for name in names):
        packed = any("grid" in name or "target_sizes" in name for name in names)
        yield from zip(images, images, strict=True) if packed else product(images, _VIDEOS)
    else:
        yield from ((layout, "frames") for layout in images)


def _image_layouts(names: str) -> tuple[str, ...]:
    hinted = next((layouts for part, layouts in _IMAGES if part in names), ())
    return hinted or (*_USUAL, "padded patches", "patches", "merged patches", _CUBES)
