"""Inputs for the forward of a Transformers model, made from the names of its parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tract_hub.locator.zoos.hf_config import ImageSizes, Settings
from tract_hub.locator.zoos.hf_layouts import LAYOUTS

PIXELS = re.compile(
    r"(\w+_)?pixel_values(_\w+)?|images?|flattened_patches|image_patches|prompt_depth|prompt_masks"
)
"""Parameters of a forward that are images or video."""

UNNAMED_PIXELS = re.compile(r"inputs|hidden_states")
"""Parameters that are pixels where no other is: of Perceiver, and of towers of vision alone."""

SPECTROGRAMS = re.compile(r"input_features|input_values")
"""Parameters that are sound, followed where a forward takes no pixels."""

WORDS = re.compile(r"(decoder_|classes_|tasks_|qformer_)?(input_ids|attention_mask)")
"""Parameters that are a text, or say which of its words count."""

LENGTH = 16
"""Tokens of a text: short, for some models take no more."""


@dataclass(frozen=True)
class Situation:
    """What the makers of inputs go by.

    Attributes:
        sizes: sizes of images.
        settings: the model's config.
        layout: key in ``LAYOUTS`` of images.
        video_layout: of videos.
        dtype: of pixels.

    """

    sizes: ImageSizes
    settings: Settings
    layout: str
    video_layout: str
    dtype: torch.dtype


def make_inputs(
    names: Iterable[str], situation: Situation
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Make an input for each name that is known; return them, and those that are pixels.

    Sound is only followed where there are no pixels.
    """
    names = list(names)
    kwargs: dict[str, Any] = {}
    pixels: list[Tensor] = []
    seen = any(PIXELS.fullmatch(name) for name in names)
    for name in names:
        if any(kind.fullmatch(name) for kind in (PIXELS, UNNAMED_PIXELS, SPECTROGRAMS)):
            layout = situation.video_layout if "video" in name else situation.layout
            shape = LAYOUTS[layout](_sizes_for(name, situation))
            kwargs[name] = torch.empty(shape, dtype=situation.dtype, device="meta")
            if not (seen and SPECTROGRAMS.fullmatch(name)):
                pixels.append(kwargs[name])
        elif maker := maker_of(name):
            kwargs[name] = maker(situation)
    return kwargs, tuple(pixels)


def maker_of(name: str) -> Callable[[Situation], Any] | None:
    """Return what makes an input of this name, None where it is not known."""
    return MAKERS.get(name) or (_words if WORDS.fullmatch(name) else None)


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
    clips = situation.settings.number("temporal_merge_size", default=1)
    return replace(situation.sizes, clips=clips)


def _tokens(situation: Situation) -> int:
    """Tokens of a text that stand for one image."""
    return situation.sizes.patches // situation.sizes.merge**2


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def _words(situation: Situation) -> Tensor:
    return _ones(1, LENGTH)


def _text(situation: Situation) -> Tensor:
    """Words, and among them some that stand for an image: Phi-4 looks for these."""
    text = _words(situation)
    text[:, 1 : LENGTH // 2] = situation.settings.get("image_token_id", default=1)
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


def _masked_patches(situation: Situation) -> Tensor:
    sizes = situation.sizes
    return _ones(1, (sizes.height // sizes.patch) * (sizes.width // sizes.patch)).bool()


MAKERS: Mapping[str, Callable[[Situation], Any]] = {
    "classes_structure": lambda s: _ones(1),
    "input_ids": _text,
    "image_attention_mask": _mask_of_images,
    "bbox": lambda s: _words(s).new_zeros(*_words(s).shape, 4),
    "task_inputs": lambda s: _ones(1, s.settings.number("task_seq_len", default=77)),
    "image_grid_thw": _grid_in_time,
    "video_grid_thw": lambda s: torch.tensor([[_video_sizes(s).clips, *s.sizes.grid]]),
    "grid_thw": _grid_in_time,
    "grid_hws": _grid,
    "image_grid_hw": _grid,
    "spatial_shapes": _grid,
    "target_sizes": _grid,
    "target_sizes_videos": _grid,
    "merge_sizes": lambda s: torch.tensor([s.sizes.merge]),
    "image_merge_sizes": lambda s: torch.tensor([s.sizes.merge]),
    "video_merge_sizes": lambda s: torch.tensor([s.sizes.merge]),
    "pixel_position_ids": lambda s: _ones(1, s.sizes.patches, 2),
    "image_position_ids": lambda s: _ones(1, s.sizes.patches, 2),
    "video_position_ids": lambda s: _ones(1, s.sizes.patches, 2),
    "num_frames_per_video": lambda s: _ones(1),
    "num_local_patches": lambda s: [1],
    "patches_grid": lambda s: [[1, 1]],
    "image_token_pooling": lambda s: _ones(_tokens(s), 4),
    "video_token_pooling": lambda s: _ones(_tokens(s), 4),
    "image_grids": lambda s: torch.tensor([[1, _tokens(s), 0, 0]]),
    "video_grids": lambda s: torch.tensor([[1, 1, _tokens(s)]]),
    "bool_masked_pos": _masked_patches,
    "image_sizes": lambda s: torch.tensor([[s.sizes.height, s.sizes.width]]),
    "pixel_attention_mask": _mask_of_pixels,
    "pixel_mask": _mask_of_pixels,
    "aspect_ratio_ids": lambda s: _ones(1, 1),
    "aspect_ratio_mask": lambda s: _ones(1, 1, s.sizes.tiles),
    "image_embeds_position_mask": lambda s: _words(s).bool(),
    "input_features_mask": lambda s: _ones(1, s.sizes.sound),
}
"""Parameter of a forward → what makes it."""

NOT_AT_FIRST = frozenset(
    "attention_mask image_sizes pixel_mask image_attention_mask bool_masked_pos".split()
)
"""Parameters that many forwards refuse to combine with others, or need not be given."""
