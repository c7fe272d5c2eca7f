"""Inputs for the forward of a Transformers model: layouts of pixels, and what goes with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tract_hub.locator.zoos.hf_config import ImageSizes, Settings

PIXELS = re.compile(
    r"(\w+_)?pixel_values(_\w+)?|images?|flattened_patches|image_patches|prompt_depth|prompt_masks"
)
"""Parameters of a forward that are images or video."""

UNNAMED_PIXELS = re.compile(r"inputs|hidden_states")
"""Parameters that are pixels where no other is: of Perceiver, and of towers of vision alone."""

SPECTROGRAMS = re.compile(r"input_features|input_values")
"""Parameters that are sound, followed where a forward takes no pixels."""

LENGTH = 16
"""Tokens of a text: short, for some models take no more."""


LAYOUTS: Mapping[str, Callable[[ImageSizes], tuple[int, ...]]] = {
    "image": lambda s: (1, s.channels, s.height, s.width),
    "frames": lambda s: (1, s.frames, s.channels, s.height, s.width),
    "one of several": lambda s: (1, 1, s.channels, s.height, s.width),
    "pair": lambda s: (1, 2, s.channels, s.height, s.width),
    "tiles": lambda s: (1, 1, s.tiles, s.channels, s.height, s.width),
    "patches": lambda s: (s.patches, s.patch_features),
    "square patches": lambda s: (s.patches, s.channels, s.patch, s.patch),
    "padded patches": lambda s: (1, s.patches, s.patch_features),
    "merged patches": lambda s: (s.tokens, s.merge * s.patch, s.merge * s.patch, s.channels),
    "padded merged patches": lambda s: (1, s.patches, s.patch_features * s.merge**2),
    "patches of one image": lambda s: (1, s.patches_of_image, s.patch_features),
    "cubes, channels last": lambda s: (1, s.frames_per_patch, s.patch, s.patch, s.channels),
    "one camera of several": lambda s: (1, 1, s.channels, s.height, s.width),
    "half image": lambda s: (1, s.channels, s.height // 2, s.width),
    "strip of patches": lambda s: (1, s.channels, s.patch, s.patches * s.patch),
    "placed patches": lambda s: (1, s.patches, 2 + s.patch_features),
    "pair of surroundings": lambda s: (1, 2, s.channels * 3**2, s.height, s.width),
    "mel × time": lambda s: (1, s.mels, 2 * s.positions),
    "time × mel": lambda s: (1, 2 * s.positions, s.mels),
    "one channel of time × mel": lambda s: (1, 1, 2 * s.positions, s.mels),
    "wave": lambda s: (1, 16_000),
    "one channel of a wave": lambda s: (1, 1, 16_000),
}
"""Name of a layout → the shape of pixels of these sizes, the likeliest first."""

_HINTS = (
    ("input_features", ("mel × time", "time × mel", "one channel of time × mel")),
    ("input_values", ("time × mel", "wave", "one channel of a wave")),
    ("flattened_patches", ("placed patches",)),
    ("prompt_pixel_values", ("half image",)),
    ("token_pooling", ("patches of one image",)),
    ("target_sizes", ("strip of patches",)),
    ("grid", ("patches", "square patches")),
    ("grid|spatial_shapes|position_ids", ("padded patches", "padded merged patches")),
    ("pixel_attention_mask", ("one of several",)),
)
"""Pattern of a parameter's name → the layouts that it hints at."""


@dataclass(frozen=True)
class Situation:
    """What the makers of inputs go by."""

    sizes: ImageSizes
    settings: Settings
    layout: str  # key in ``LAYOUTS``
    dtype: torch.dtype  # of pixels


def layouts_for(names: Iterable[str]) -> list[str]:
    """List the layouts that the names of a forward's inputs hint at, and then all of images."""
    text = " ".join(names)
    hinted = [layouts for pattern, layouts in _HINTS if re.search(pattern, text)]
    others = (layout for layout in LAYOUTS if "mel" not in layout and "wave" not in layout)
    return list(dict.fromkeys([*chain(*hinted), *others]))


def make_input(name: str, situation: Situation) -> Any:
    """Make the input of this name; pixels and sound in the layout of the situation."""
    maker = maker_of(name)
    if maker:
        return maker(situation)
    layout = situation.layout
    if "video" in name and not re.search("patches|frames|cubes", layout):
        layout = "frames"
    shape = LAYOUTS[layout](_sizes_for(name, situation))
    return torch.empty(shape, dtype=situation.dtype, device="meta")


def maker_of(name: str) -> Callable[[Situation], Any] | None:
    """Return what makes an input of this name, None where it is not known."""
    return next((make for names, make in MAKERS.items() if re.fullmatch(names, name)), None)


def _sizes_for(name: str, situation: Situation) -> ImageSizes:
    """Sizes of an input with a config of its own: ``high_res_pixel_values``, say."""
    if "video" in name:
        return _video_sizes(situation)
    if name == "codebook_pixel_values":  # FLAVA: one code a patch, of 8 × 8 pixels
        side = 8 * (situation.sizes.height // situation.sizes.patch)
        return replace(situation.sizes, height=side, width=side)
    if name == "prompt_depth":
        return replace(situation.sizes, channels=1)
    prefix = name.partition("pixel_values")[0].rstrip("_")
    config = situation.settings.get(f"{prefix}_vision_config") if prefix else None
    return Settings(config).image_sizes() if config else situation.sizes


def _video_sizes(situation: Situation) -> ImageSizes:
    clips = situation.settings.number("temporal_merge_size", 1)
    return replace(situation.sizes, clips=clips)


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def _words(situation: Situation) -> Tensor:
    return _ones(1, LENGTH)


def _text(situation: Situation) -> Tensor:
    """Words, and among them some that stand for an image: Phi-4 looks for these."""
    text = _words(situation)
    text[:, 1 : LENGTH // 2] = situation.settings.number("image_token_id", 1)
    return text


def _grid(situation: Situation) -> Tensor:
    """Rows and columns, of merged patches where they come merged."""
    once = situation.sizes.merge if situation.layout == "merged patches" else 1
    return torch.tensor([situation.sizes.grid]) // once


def _grid_in_time(situation: Situation) -> Tensor:
    return torch.cat([_ones(1, 1), _grid(situation)], dim=1)


def _mask_of_pixels(situation: Situation) -> Tensor:
    shape = LAYOUTS[situation.layout](situation.sizes)
    if situation.layout == "one camera of several":
        return _ones(*shape[:2]).bool()
    return _ones(*shape[:2]) if "patches" in situation.layout else _ones(*shape[:-3], *shape[-2:])


def _mask_of_images(situation: Situation) -> Tensor:
    """Which words see which image (Idefics), or which patches of two crops are used (Phi-4)."""
    sizes = situation.sizes
    if situation.layout == "pair":
        return _ones(1, 2, sizes.height // sizes.patch, sizes.width // sizes.patch)
    return _words(situation).unsqueeze(-1)


MAKERS: Mapping[str, Callable[[Situation], Any]] = {
    "input_ids": _text,
    "((decoder|classes|tasks|qformer)_)?(input_ids|attention_mask)": _words,
    "bbox": lambda s: _words(s).new_zeros(1, LENGTH, 4),
    "task_inputs": lambda s: _ones(1, s.settings.number("task_seq_len", 77)),
    "(image_)?grid_thw": _grid_in_time,
    "video_grid_thw": lambda s: torch.tensor([[_video_sizes(s).clips, *s.sizes.grid]]),
    "image_grid_hw|spatial_shapes|target_sizes(_videos)?": _grid,
    "((image|video)_)?merge_sizes": lambda s: torch.tensor([s.sizes.merge]),
    "(pixel|image|video)_position_ids": lambda s: _ones(1, s.sizes.patches, 2),
    "num_frames_per_video|classes_structure": lambda s: _ones(1),
    "num_local_patches": lambda s: [1],
    "patches_grid": lambda s: [[1, 1]],
    "(image|video)_token_pooling": lambda s: _ones(s.sizes.tokens, 4),
    "image_grids": lambda s: torch.tensor([[1, s.sizes.tokens, 0, 0]]),
    "video_grids": lambda s: torch.tensor([[1, 1, s.sizes.tokens]]),
    "bool_masked_pos": lambda s: _ones(1, s.sizes.patches_of_image).bool(),
    "image_sizes": lambda s: torch.tensor([[s.sizes.height, s.sizes.width]]),
    "pixel_(attention_)?mask": _mask_of_pixels,
    "image_attention_mask": _mask_of_images,
    "aspect_ratio_ids": lambda s: _ones(1, 1),
    "aspect_ratio_mask": lambda s: _ones(1, 1, s.sizes.tiles),
    "image_embeds_position_mask": lambda s: _words(s).bool(),
    "input_features_mask": lambda s: _ones(1, 2 * s.sizes.positions),
}
"""Names of parameters of a forward → what makes them; of several that fit, the first counts."""

NOT_AT_FIRST = frozenset(
    "attention_mask image_sizes pixel_mask image_attention_mask bool_masked_pos".split()
)
"""Parameters that many forwards refuse to combine with others, or need not be given."""
