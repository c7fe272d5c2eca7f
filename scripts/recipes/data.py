"""Images for a recipe: timm's datasets and transforms, a sampler for each process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from recipe import Recipe
from timm.data import Mixup, create_dataset, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from torchvision import transforms


def train_loader(recipe: Recipe, root: Path, batch: int, workers: int, at: Accelerator) -> Any:
    """Make the loader of this process; its sampler's `set_epoch` is called each epoch."""
    data = _dataset(recipe, root, "train")
    data.transform = _train_transform(recipe)
    share = {"num_replicas": at.num_processes, "rank": at.process_index}
    sampler: Sampler[int] = DistributedSampler(data, **share)
    if recipe.repeats:
        rounded = 256 if len(data) >= 256 else 0  # as newer timm has it; 1.0.24 selects none
        sampler = RepeatAugSampler(
            data, num_repeats=recipe.repeats, selected_round=rounded, **share
        )
    return DataLoader(data, batch, sampler=sampler, num_workers=workers, drop_last=True)


def eval_loader(recipe: Recipe, root: Path, batch: int, workers: int) -> Any:
    """Make the loader of all evaluation images, in order."""
    data = _dataset(recipe, root, "val")
    known = {k: v for k, v in recipe.transform.items() if k in ("input_size", "mean", "std")}
    known["interpolation"] = recipe.transform.get("interpolation", "bilinear")
    data.transform = create_transform(**known, crop_pct=recipe.eval_crop)
    return DataLoader(data, batch, num_workers=workers)


def mixup_of(recipe: Recipe) -> Mixup | None:
    """Return what mixes the images of a batch, where the recipe mixes them."""
    return Mixup(**recipe.mixup, num_classes=recipe.classes) if recipe.mixup else None


def make_images(root: Path) -> None:
    """Write 4 classes × 8 images of random pixels for a smoke run."""
    pixels = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(32):
            folder = root / split / f"class{i % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels.integers(0, 256, (48, 48, 3), dtype=np.uint8))
            image.save(folder / f"{i}.png")


def _dataset(recipe: Recipe, root: Path, split: str) -> Any:
    return create_dataset(recipe.data, root=str(root), split=split)


def _train_transform(recipe: Recipe) -> Any:
    options = dict(recipe.transform)
    pad = options.pop("pad", None)
    if pad is None:
        return create_transform(**options, is_training=True)
    return transforms.Compose(
        [
            transforms.RandomCrop(options["input_size"], padding=pad, pad_if_needed=True),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(options["mean"], options["std"]),
        ]
    )
