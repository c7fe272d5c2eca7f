"""Images at the model's size, normalised by their own statistics, in batches."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from tract_hub.errors import SettingsError
from tract_hub.studies.images.augment import CropFlip
from tract_hub.studies.images.splits import Source, Split

# Above this many bytes of uint8 pixels, images are read again for every batch.
MEMORY_LIMIT = 2**30
STATISTICS_IMAGES = 10_000
Batch = tuple[Tensor, Tensor]


class Images(Dataset[Batch]):
    """Images of one size; fetches whole batches.

    Args:
        split: images and labels.
        augment: cuts a batch of them, or None.

    """

    def __init__(self, split: Split, augment: CropFlip | None = None) -> None:
        self.split = split
        self.augment = augment

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return uint8 images, batch × channels × height × width, and their labels."""
        images, labels = self.split.batch(indices)
        return (images if self.augment is None else self.augment(images, indices)), labels

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from now on; Accelerate's loaders call this every epoch."""
        if self.augment is not None:
            self.augment.set_epoch(epoch)


@dataclass(frozen=True)
class Prepared:
    """A data set fitted to a model.

    Args:
        source: where the images come from.
        train: training images at the model's size.
        test: test images at the model's size.
        size: side of the square images in pixels.
        mean: of the training images by channel, pixels in [0, 1].
        std: their deviation.
        in_memory: whether all images were decoded once.

    """

    source: Source
    train: Split
    test: Split
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_memory: bool

    def normaliser(self, name: str = "standard") -> v2.Transform:
        """Return what turns a uint8 batch into float32.

        Args:
            name: ``"standard"``: mean 0 and deviation 1; ``"unit"``: [0, 1]; ``"bytes"``:
                [0, 255].

        """
        if name != "standard":
            return v2.ToDtype(torch.float32, scale=name == "unit")
        return v2.Compose(
            [
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean=list(self.mean), std=list(self.std)),
            ]
        )

    def to(self, device: torch.device) -> Prepared:
        """Return the same images on a device, where they are in memory at all."""
        if not self.in_memory:
            return self
        train, test = _moved(self.train, device), _moved(self.test, device)
        return replace(self, train=train, test=test)

    def summary(self) -> dict[str, Any]:
        """Return what identifies these data in results, JSON-ready and without any path."""
        labels = torch.cat([self.train.labels, self.test.labels]).cpu().numpy().tobytes()
        return {
            "name": self.source.name,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "classes": list(self.source.classes),
            "channels": self.source.channels,
            "size": self.size,
            "mean": [round(value, 6) for value in self.mean],
            "std": [round(value, 6) for value in self.std],
            "labels_sha256": hashlib.sha256(labels).hexdigest()[:16],
        }


def prepare(source: Source, size: int) -> Prepared:
    """Bring a data set to the model's image size and measure its normalisation.

    Args:
        source: the data set.
        size: side in pixels. Images of another size are resized (shorter side, bilinear,
            antialiased) and cropped to their central square.

    Raises:
        DataError: an image cannot be read.

    """
    bytes_needed = (len(source.train) + len(source.test)) * source.channels * size**2
    in_memory = bytes_needed <= MEMORY_LIMIT
    train, test = _resized(source.train, size), _resized(source.test, size)
    if in_memory:
        train, test = _decoded(train), _decoded(test)
    mean, std = _statistics(train)
    return Prepared(source, train, test, size, mean, std, in_memory)


def _resized(split: Split, size: int) -> Split:
    def read(i: int) -> Tensor:
        image = split.read(i)
        if tuple(image.shape[1:]) == (size, size):
            return image
        image = v2.functional.resize(image, [size], antialias=True)
        cropped: Tensor = v2.functional.center_crop(image, [size, size])
        return cropped

    return Split(split.name, read, split.labels)


def _decoded(split: Split) -> Split:
    images = torch.stack([split.read(i) for i in range(len(split))])
    return Split(split.name, images.__getitem__, split.labels, images)


def _moved(split: Split, device: torch.device) -> Split:
    if split.pixels is None:
        return split
    pixels = split.pixels.to(device)
    return Split(split.name, pixels.__getitem__, split.labels.to(device), pixels)


def _statistics(train: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation by channel over the training images, evenly chosen if many."""
    count = min(len(train), STATISTICS_IMAGES)
    sums = squares = torch.zeros((), dtype=torch.float64)
    pixels = 0
    for i in range(count):
        image = train.read(i * len(train) // count).double().div(255).flatten(1)
        sums, squares = sums + image.sum(1), squares + image.square().sum(1)
        pixels += image.shape[1]
    mean = sums / pixels
    std = (squares / pixels - mean.square()).clamp_min(0).sqrt()
    # A channel that never changes has nothing to scale.
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return tuple(mean.tolist()), tuple(std.tolist())


def train_loader(
    data: Prepared, augment: str, batch_size: int, seed: int, workers: int | None
) -> DataLoader[Batch]:
    """Return shuffled training batches whose order and augmentation depend on the seed alone.

    Args:
        data: the images.
        augment: ``"none"``, or ``"crop-flip"``: see :class:`CropFlip`.
        batch_size: images a batch; a last smaller batch is left out.
        seed: of order and augmentation.
        workers: reading processes; None chooses.

    Raises:
        SettingsError: the batch is larger than the training set.

    """
    if batch_size > len(data.train):
        raise SettingsError(
            f"--batch-size {batch_size} is more than the {len(data.train)} training images; "
            "lower it"
        )
    cut = CropFlip(len(data.train), data.size, seed) if augment == "crop-flip" else None
    return DataLoader(
        Images(data.train, cut),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=_as_fetched,
        num_workers=_workers(data, workers),
    )


def test_loader(data: Prepared, batch_size: int, workers: int | None) -> DataLoader[Batch]:
    """Return the test images in order; arguments as for :func:`train_loader`."""
    return DataLoader(
        Images(data.test),
        batch_size=batch_size,
        collate_fn=_as_fetched,
        num_workers=_workers(data, workers),
    )


def _as_fetched(batch: Any) -> Any:
    """Leave a batch as ``__getitems__`` gave it: stacked already."""
    return batch


def _workers(data: Prepared, asked: int | None) -> int:
    if asked is not None:
        return asked
    return 0 if data.in_memory else min(8, (os.cpu_count() or 2) - 1)
