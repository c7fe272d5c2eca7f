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
    """Sizes of the images, videos, patches and spectrograms that a model takes.

    Attributes:
        channels: colour channels.
        height: of an image.
        width: of an image.
        patch: side of a square patch.
        frames: of a video.
        frames_per_patch: frames that one patch spans.
        merge: side of the squares of patches that become one token.
        tiles: images that one image is cut into.
        mels: frequencies of a spectrogram.
        sound: its steps in time.
        clips: grids of patches, one after another in time, that a video has.

    """

    channels: int
    height: int
    width: int
    patch: int
    frames: int
    frames_per_patch: int
    merge: int
    tiles: int
    mels: int
    sound: int
    clips: int = 1

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
    def patch_features(self) -> int:
        """Numbers in one flattened patch."""
        return self.channels * self.frames_per_patch * self.patch**2


class Settings:
    """Looks settings up in a config and in those nested in it, of images before all others."""

    def __init__(self, config: Any) -> None:
        self.configs = list(_nested(config))

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first of these settings that any config has, searched config by config."""
        for config in self.configs:
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def number(self, *names: str, default: int) -> int:
        """Return a setting's number, the first where it holds several."""
        return _first(self.get(*names), default)

    def image_sizes(self) -> ImageSizes:
        """Read the sizes of images, with usual ones where the config tells nothing."""
        size = self.get(
            "image_size",
            "crop_size",
            "max_img_size",
            "input_size",
            "train_size",
            "resolution",
            "pretrain_image_size",
        )
        height, width = _sides(size, 224)
        ratios = self.get("scaled_images_ratios")  # the smallest copy of an image is one patch
        if ratios:
            height = width = int(self.number("patch_size", default=384) / min(ratios))
        # RF-DETR's own image, of 37 patches, is not made of its windows
        window = self.number("patch_size", default=16) * self.number("num_windows", default=1)
        if window > self.number("patch_size", default=16):
            height, width = height - height % window, width - width % window
        tubelet = self.get("tubelet_size", "temporal_patch_size", "patch_temporal")
        return ImageSizes(
            channels=self.number("num_channels", "in_channels", "in_chans", default=3),
            height=height,
            width=width,
            patch=self.number("patch_size", default=16),
            frames=self.number("num_frames", "frames_per_clip", default=8),
            frames_per_patch=_first(tubelet, 1),
            merge=self.number(
                "spatial_merge_size",
                "merge_kernel_size",
                "merge_size",
                "pooling_kernel_size",
                default=1,
            ),
            tiles=self.number("max_num_tiles", default=1),
            mels=self.number("num_mel_bins", "feature_size", default=80),
            sound=2 * self.number("max_source_positions", default=512),
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


def _first(size: Any, default: int) -> int:
    first = size[0] if isinstance(size, (tuple, list)) else size
    return first if isinstance(first, int) else default
