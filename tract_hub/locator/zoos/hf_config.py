"""What a Transformers config tells about the images that its model takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

_OF_IMAGES = re.compile("vision|image|visual|video|backbone|encoder|vlm|vit|thinker|detector")
_OF_OTHERS = re.compile("text|audio|speech|decoder|talker|prompt|qformer|mask|generation")


def _setting(names: str, default: int) -> Any:
    """A number that a config may have under one of these names."""
    return field(default=default, metadata={"setting": (names, default)})


@dataclass(frozen=True)
class ImageSizes:
    """Sizes of the images, videos, patches and spectrograms that a model takes."""

    height: int
    width: int
    channels: int = _setting("num_channels in_channels in_chans", 3)
    patch: int = _setting("patch_size", 16)  # side of a square patch
    frames: int = _setting("num_frames frames_per_clip", 8)
    frames_per_patch: int = _setting("tubelet_size temporal_patch_size patch_temporal", 1)
    # side of the squares of patches that become one token
    merge: int = _setting("spatial_merge_size merge_kernel_size merge_size pooling_kernel_size", 1)
    tiles: int = _setting("max_num_tiles", 1)  # images that one image is cut into
    mels: int = _setting("num_mel_bins feature_size", 80)  # frequencies of a spectrogram
    positions: int = _setting("max_source_positions", 512)  # of two steps in time of it
    clips: int = 1  # grids of patches, one after another in time, that a video has

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches: a small grid that merges without remainder."""
        side = self.merge * max(2, 12 // self.merge)
        return side, side

    @property
    def patches(self) -> int:
        """Number of patches in all grids."""
        return self.clips * self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens of a text that stand for all grids."""
        return self.patches // self.merge**2

    @property
    def patches_of_image(self) -> int:
        """Number of patches in an image of the whole height and width."""
        return (self.height // self.patch) * (self.width // self.patch)

    @property
    def patch_features(self) -> int:
        """Numbers in one flattened patch."""
        return self.channels * self.frames_per_patch * self.patch**2


_SETTINGS = [field for field in fields(ImageSizes) if field.metadata]


class Settings:
    """Looks settings up in a config and in those nested in it, of images before all others."""

    def __init__(self, config: Any) -> None:
        self.configs = list(_nested(config))

    def get(self, names: str) -> Any:
        """Return the first of these settings that any config has, searched config by config."""
        values = (getattr(config, name, None) for config in self.configs for name in names.split())
        return next((value for value in values if value is not None), None)

    def number(self, names: str, default: int) -> int:
        """Return a setting's number, the first where it holds several."""
        value = self.get(names)
        first = value[0] if isinstance(value, (tuple, list)) else value
        return first if isinstance(first, int) else default

    def image_sizes(self) -> ImageSizes:
        """Read the sizes of images, with usual ones where the config tells nothing."""
        size = self.get(
            "image_size crop_size max_img_size input_size train_size resolution pretrain_image_size"
        )
        height, width = _sides(size, 224)
        ratios = self.get("scaled_images_ratios")  # the smallest copy of an image is one patch
        if ratios:
            height = width = int(self.number("patch_size", 384) / min(ratios))
        sizes = {f.name: self.number(*f.metadata["setting"]) for f in _SETTINGS}
        windows = self.number("num_windows", 1)
        if windows > 1:  # RF-DETR's own image, of 37 patches, is not made of its windows
            height -= height % (sizes["patch"] * windows)
            width -= width % (sizes["patch"] * windows)
        return ImageSizes(height, width, **sizes)


def _nested(config: Any) -> Iterator[Any]:
    """Yield a config and all inside it, depth first; those of images before the others."""
    if config is None:
        return
    yield config
    inner = [(k, v) for k, v in vars(config).items() if hasattr(v, "to_dict")]
    for _, value in sorted(inner, key=lambda item: _rank(item[0])):
        yield from _nested(value)


def _rank(name: str) -> int:
    if _OF_OTHERS.search(name):
        return 2
    return 0 if _OF_IMAGES.search(name) else 1


def _sides(size: Any, default: int) -> tuple[int, int]:
    """Height and width of a size given as a number, a pair or a dict."""
    if isinstance(size, dict):
        size = [size.get("height", size.get("shortest_edge")), size.get("width")]
    numbers = size if isinstance(size, (tuple, list)) else [size]
    numbers = [n for n in numbers if isinstance(n, int)] or [default]
    return numbers[-2:][0], numbers[-1]
