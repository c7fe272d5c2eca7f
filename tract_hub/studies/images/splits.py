"""Labelled images, and fixed ways to cut them in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tract_hub.errors import DataError

# The same parts for every run of every comparison.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Some images and their labels.

    Args:
        name: ``"train"`` or ``"test"``, for messages.
        read: gives image i as uint8, channels × height × width.
        labels: class indices, int64, one an image.
        pixels: all images in one tensor, where they were decoded once.

    """

    name: str
    read: Callable[[int], Tensor]
    labels: Tensor
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return images as uint8, batch × channels × height × width, and their labels."""
        labels = self.labels[indices]
        if self.pixels is not None:
            return self.pixels[indices], labels
        return torch.stack([self.read(i) for i in indices]), labels


@dataclass(frozen=True)
class Source:
    """A data set as it is found, before it is fitted to a model.

    Args:
        name: without any folder in front.
        train: what is trained on.
        test: what accuracy is measured on.
        classes: names of the classes, in the order of the labels.
        channels: of every image.

    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    channels: int

    def native_size(self) -> int | None:
        """Return the side in pixels when the images are square and of one size, else None.

        Looks at the first 64 training images.
        """
        shapes = {tuple(self.train.read(i).shape[1:]) for i in range(min(64, len(self.train)))}
        height, width = shapes.pop()
        return int(height) if not shapes and height == width else None


def at_most(split: Split, count: int | None) -> Split:
    """Return so many images of a split, drawn the same way every time; None: all."""
    if count is None or count >= len(split):
        return split
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    chosen = torch.randperm(len(split), generator=generator)[:count].sort().values
    return _subset(split, chosen, split.name)


def of_classes(split: Split, classes: list[int]) -> Split:
    """Return the images of these classes, which are numbered anew in the order given."""
    wanted = torch.tensor(classes)
    part = _subset(split, torch.isin(split.labels, wanted).nonzero().flatten(), split.name)
    numbers = torch.zeros(1 + int(wanted.max()), dtype=torch.int64)
    numbers[wanted] = torch.arange(len(classes))
    return replace(part, labels=numbers[part.labels])


def _subset(split: Split, chosen: Tensor, name: str) -> Split:
    indices = chosen.tolist()
    return Split(name, lambda i: split.read(indices[i]), split.labels[chosen])


def stratified(whole: Split, test_size: float | int) -> tuple[Split, Split]:
    """Cut one split in two, every class in the same share, always the same way."""
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(
            range(len(whole)),
            test_size=test_size,
            stratify=whole.labels.numpy(),
            random_state=SPLIT_SEED,
        )
    except ValueError as error:
        raise DataError(
            f"no test split there, and none can be cut from train ({error}): add a folder or file "
            "named test, or more images of each class"
        ) from error
    return (
        _subset(whole, torch.tensor(sorted(train)), "train"),
        _subset(whole, torch.tensor(sorted(test)), "test"),
    )
