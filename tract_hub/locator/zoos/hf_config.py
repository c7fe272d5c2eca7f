"""What a Transformers config tells about the images that its model takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_OF_IMAGES = re.compile("vision|image|visual|video|backbone|encoder|vlm|vit|thinker|detector")
_OF_OTHERS = re.compile("text|audio|speech|decoder|talker|prompt|qformer|mask|generation")


@dataclass(frozen=True)
class ImageSizes:
    """Sizes of the images, videos, patches and spectrograms that a model takes."""

    channels: int
    height: int
    width: int
    patch: int  # side of a square patch
    frames: int
    frames_per_patch: int
    merge: int  # side of the squares of patches that become one token
    tiles: int  # images that one image is cut into
    mels: int  # frequencies of a spectrogram
    sound: int  # its steps in time
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
        patch, windows = self.number("patch_size", 16), self.number("num_windows", 1)
        if windows > 1:  # RF-DETR's own image, of 37 patches, is not made of its windows
            height -= height % (patch * windows)
            width -= width % (patch * windows)
        merge = "spatial_merge_size merge_kernel_size merge_size pooling_kernel_size"
        return ImageSizes(
            channels=self.number("num_channels in_channels in_chans", 3),
            height=height,
            width=width,
            patch=patch,
            frames=self.number("num_frames frames_per_clip", 8),
            frames_per_patch=self.number("tubelet_size temporal_patch_size patch_temporal", 1),
            merge=self.number(merge, 1),
            tiles=self.number("max_num_tiles", 1),
            mels=self.number("num_mel_bins feature_size", 80),
            sound=2 * self.number("max_source_positions", 512),
        )


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
