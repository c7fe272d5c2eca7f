"""How Transformers models have their pixels laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from tract_hub.adapters.hf_config import ImageSizes

LAYOUTS: Mapping[str, Callable[[ImageSizes], tuple[int, ...]]] = {
    "image": lambda s: (1, s.channels, s.height, s.width),
    "half image": lambda s: (1, s.channels, s.height // 2, s.width),
    "frames": lambda s: (1, s.frames, s.channels, s.height, s.width),
    "channels before frames": lambda s: (1, s.channels, s.frames, s.height, s.width),
    "pair": lambda s: (1, 2, s.channels, s.height, s.width),
    "one of several": lambda s: (1, 1, s.channels, s.height, s.width),
    "several videos": lambda s: (1, 1, s.frames, s.channels, s.height, s.width),
    "tiles": lambda s: (1, 1, s.tiles, s.channels, s.height, s.width),
    "cubes, channels last": lambda s: (1, s.frames_per_patch, s.patch, s.patch, s.channels),
    "patches": lambda s: (s.patches, s.patch_features),
    "padded patches": lambda s: (1, s.patches, s.patch_features),
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
    "mel × time": lambda s: (1, s.mels, s.sound),
    "time × mel": lambda s: (1, s.sound, s.mels),
    "one channel of time × mel": lambda s: (1, 1, s.sound, s.mels),
    "wave": lambda s: (1, 16_000),
}
"""Name of a layout → the shape of pixels of these sizes."""

_IMAGES = (
    ("input_features", ("mel × time", "time × mel", "one channel of time × mel")),
    ("input_values", ("time × mel", "wave")),
    ("flattened_patches", ("placed patches", "image")),
    ("grid", ("patches", "square patches", "padded square patches", "cube patches", "image")),
    ("target_sizes", ("strip of patches", "image")),
    ("spatial_shapes", ("padded patches", "image")),
    ("l_position_ids", ("padded patches", "image")),
    ("image_position_ids", ("padded patches", "image")),
    ("image_patches", ("padded patches",)),
    ("prompt_pixel_values", ("half image", "image")),
    ("pixel_attention_mask", ("one of several", "image")),
)
"""Part of a parameter's name → the layouts that it hints at."""

_USUAL = ("image", "frames", "one of several", "pair", "channels before frames", "tiles")


def image_layouts(names: Iterable[str]) -> tuple[str, ...]:
    """Layouts of images that fit a forward with these parameters, the likeliest first."""
    text = " ".join(names)
    hinted = next((layouts for part, layouts in _IMAGES if part in text), ())
    return hinted or (*_USUAL, "padded patches", "patches", "merged patches")


def video_layouts(names: Iterable[str]) -> tuple[str, ...]:
    """Layouts of videos that fit a forward with these parameters, the likeliest first."""
    videos = [name for name in names if "video" in name]
    if not any("pixel" in name for name in videos):
        return ("frames",)
    text = " ".join(videos)
    if "grid" in text:
        return ("patches", "square patches", "frames")
    if "target_sizes" in text:
        return ("strip of patches",)
    return ("frames", "channels before frames", "several videos", "padded patches")
