"""Labelled images from anywhere, as batches of uint8 tensors."""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert
from torchvision.transforms import v2

from tract_hub.errors import DataError, first_line
from tract_hub.names import did_you_mean

TEST_NAMES = ("test", "validation", "valid", "val", "eval")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "class_id")
HUB_EXAMPLES = ("uoft-cs/cifar10", "uoft-cs/cifar100", "ylecun/mnist")
TEST_SHARE = 0.2
SPLIT_SEED = 0
"""The same split, and the same part of it, in every run of every study."""
MEMORY_LIMIT = 2**30
"""Bytes of uint8 pixels above which images are read again for each batch."""
LOOKED_AT = 1000
"""Images whose modes decide for all: opening one takes about 0.1 ms."""
UNEVEN = 2
"""Largest class over smallest, in the test images, above which accuracy is balanced."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Split:
    """Some images and their labels, int64; all in one tensor of pixels where they are in memory."""

    read: Callable[[int], Tensor]
    """Returns image i: uint8, channels × height × width."""
    labels: Tensor
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, indices: list[int]) -> Split:
        """Return the images of these indices."""
        return Split(lambda i: self.read(indices[i]), self.labels[indices])

    def at_most(self, count: int | None) -> Split:
        """Return so many images, drawn the same way every time; None: all."""
        if count is None or count >= len(self):
            return self
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(SPLIT_SEED))
        return self.part(sorted(drawn[:count].tolist()))

    def sized(self, size: int, in_memory: bool) -> Split:
        """Return the images at a size: shorter side resized, then the central square."""

        def read(i: int) -> Tensor:
            image = self.read(i)
            if tuple(image.shape[1:]) != (size, size):
                image = v2.functional.resize(image, [size], antialias=True)
                image = v2.functional.center_crop(image, [size, size])
            return image

        if not in_memory:
            return Split(read, self.labels)
        pixels = torch.stack([read(i) for i in range(len(self))])
        return Split(pixels.__getitem__, self.labels, pixels)


@dataclass(frozen=True)
class ImageData:
    """A data set; after :func:`fit`, with mean and deviation by channel of pixels in [0, 1]."""

    name: str
    classes: tuple[str, ...]
    """Their names, in the order of the labels."""
    channels: int
    train: Split
    test: Split
    remarks: tuple[str, ...] = ()
    """What was done to the images, in words."""
    native_size: int | None = None
    """Side in pixels, where the images are square and of one size."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def counts(self) -> dict[str, list[int]]:
        """Images by class, of each split."""
        splits = {"train": self.train, "test": self.test}
        number = len(self.classes)
        return {k: torch.bincount(s.labels, minlength=number).tolist() for k, s in splits.items()}

    @property
    def balanced(self) -> bool:
        """Whether accuracy is the mean of the classes' own, as they are uneven."""
        count = [n for n in self.counts["test"] if n]
        return max(count) > UNEVEN * min(count)

    def normalise(self, pixels: str) -> v2.Transform:
        """Return what makes float32 of a uint8 batch; for the names see ``Compare.pixels``."""
        scale = v2.ToDtype(torch.float32, scale=pixels != "bytes")
        if pixels != "standard":
            return scale
        return v2.Compose([scale, v2.Normalize(list(self.mean), list(self.std))])


def load_images(
    name: str,
    channels: int | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
) -> ImageData:
    """Open scikit-learn's digits, image folders, parquet files, a saved data set or a hub's.

    Without a test split, a fifth of train becomes one. Channels of None keep what the images are,
    RGB where that differs; 1 or 3 converts all.

    Example:
        >>> load_images("digits").counts["test"][:3]
        [45, 46, 44]

    """
    data = _digits(channels or 1) if name == "digits" else _from_datasets(name, channels)
    data = replace(data, train=data.train.at_most(max_train), test=data.test.at_most(max_test))
    classes = set(data.train.labels.tolist())
    strange = set(data.test.labels.tolist()) - classes
    if len(classes) < 2 or strange or not len(data.test):
        raise DataError(
            f"{data.name} has {len(data.train)} training images of {len(classes)} classes and "
            f"{len(data.test)} test images, of {len(strange)} other classes; a classifier needs "
            "two classes, and test images of them: check the labels, or raise --max-train"
        )
    shapes = {tuple(data.train.read(i).shape[1:]) for i in range(min(64, len(data.train)))}
    height, width = shapes.pop()
    return replace(data, native_size=height if height == width and not shapes else None)


def fit(data: ImageData, size: int) -> ImageData:
    """Bring a data set to an image size, in memory where it fits; measure mean and deviation."""
    needed = (len(data.train) + len(data.test)) * data.channels * size**2
    train, test = (split.sized(size, needed <= MEMORY_LIMIT) for split in (data.train, data.test))
    looked_at = range(0, len(train), max(1, len(train) // 10_000))
    sums = torch.zeros(2, data.channels, dtype=torch.float64)
    for i in looked_at:
        pixels = train.read(i).double().flatten(1) / 255
        sums += torch.stack([pixels.mean(1), pixels.square().mean(1)])
    mean, square = sums / len(looked_at)
    std = (square - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std > 1e-6, std, torch.ones_like(std))  # a channel that never changes
    return replace(data, train=train, test=test, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


class Loaded(Dataset[Batch]):
    """A split as batches; cuts training images anew in each epoch, alike in every arm of a seed."""

    def __init__(self, split: Split, size: int, augment: bool) -> None:
        self.split, self.size, self.augment = split, size, augment
        self.padding = max(1, size // 8)

    def __len__(self) -> int:
        return len(self.split)

    def draw(self, seed: int) -> None:
        """Draw corners and flips of all images, whatever process will read which."""
        generator = torch.Generator().manual_seed(seed)
        places = 2 * self.padding + 1
        self.corners = torch.randint(places, (len(self), 2), generator=generator)
        self.flipped = torch.rand(len(self), generator=generator) < 0.5

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return uint8 images, batch × channels × height × width, and their labels."""
        split = self.split
        if split.pixels is None:
            images = torch.stack([split.read(i) for i in indices])
        else:
            images = split.pixels[indices]
        return (self._cut(images, indices) if self.augment else images), split.labels[indices]

    def _cut(self, images: Tensor, indices: list[int]) -> Tensor:
        # torchvision's RandomCrop cuts all images of a batch alike, and one image at a time it
        # takes longer than a narrow model's step.
        padded = torch.nn.functional.pad(images, [self.padding] * 4)
        steps = torch.arange(self.size)
        across = torch.where(self.flipped[indices, None], steps.flip(0), steps)
        rows = (self.corners[indices, :1] + steps).to(images.device)
        columns = (self.corners[indices, 1:] + across).to(images.device)
        batch = torch.arange(len(indices), device=images.device)
        cut = padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return cut.movedim(-1, 1).contiguous()


def loader(
    split: Split, size: int, batch_size: int, workers: int | None, *, train: bool, augment: bool
) -> DataLoader[Batch]:
    """Return the batches of a split: to train on, shuffled and without a smaller last one."""
    many = min(8, (os.cpu_count() or 2) - 1) if workers is None else workers
    return DataLoader(
        Loaded(split, size, augment),
        batch_size=batch_size,
        shuffle=train,
        drop_last=train,
        generator=torch.Generator(),
        collate_fn=default_convert,  # __getitems__ has made a batch
        num_workers=0 if split.pixels is not None else many,
    )


def photographs(batch: int, size: int, channels: int = 3) -> Tensor:
    """Crops of scikit-learn's two photographs, standardised: (batch, channels, size, size).

    Noise would not do to time TrAct: the Gram matrix of neighbouring pixels is badly conditioned.
    """
    from sklearn.datasets import load_sample_images

    images = [torch.tensor(i).permute(2, 0, 1).float() for i in load_sample_images().images]
    crop = v2.RandomCrop(size)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        pixels = torch.stack([crop(images[i % len(images)])[:channels] for i in range(batch)])
    return (pixels - pixels.mean()) / pixels.std()


def _digits(channels: int) -> ImageData:
    """Return 1797 handwritten digits of 8 × 8 grey pixels in 17 levels, 450 of them to test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = torch.from_numpy(bunch.images)[:, None]
    images = (levels * (255 / 16)).round().to(torch.uint8).expand(-1, channels, -1, -1)
    whole = Split(images.__getitem__, torch.from_numpy(bunch.target).long())
    return ImageData("digits", tuple("0123456789"), channels, *_cut_test(whole, 450, "digits"))


def _cut_test(whole: Split, test_size: float | int, name: str) -> tuple[Split, Split]:
    from sklearn.model_selection import train_test_split

    indices, labels = range(len(whole)), whole.labels.numpy()
    options = {"test_size": test_size, "stratify": labels, "random_state": SPLIT_SEED}
    try:
        train, test = train_test_split(indices, **options)
    except ValueError as error:
        raise DataError(
            f"{name} has no test split, and none can be cut from train ({error}): add a folder or "
            "file named test, or more images of each class"
        ) from error
    return whole.part(sorted(train)), whole.part(sorted(test))


def _from_datasets(name: str, channels: int | None) -> ImageData:
    from datasets import Image

    path = Path(name).expanduser()
    shown = path.resolve().name if path.exists() else name
    tables = _opened(name, path)
    if "train" not in tables:
        raise DataError(f"{shown} has no train split, only {', '.join(tables)}; name one train")
    column, label = _columns(tables["train"], shown)
    test_name = next((n for n in TEST_NAMES if n in tables), None)
    used = {"train": tables["train"]} | ({"test": tables[test_name]} if test_name else {})
    encoded = {
        split: rows.select_columns([column]).cast_column(column, Image(decode=False))
        for split, rows in used.items()
    }
    modes: Counter[str] = Counter()
    for split, rows in encoded.items():
        for i in range(0, len(rows), max(1, len(rows) // LOOKED_AT)):
            modes[_image(rows[i][column], f"image {i} of the {split} split").mode] += 1
    kept = channels or (1 if set(modes) <= {"1", "L"} else 3)
    kind, mode, plain = ("grey", "L", {"1", "L"}) if kept == 1 else ("RGB", "RGB", {"RGB"})
    others = ", ".join(f"{n} {found}" for found, n in modes.most_common() if found not in plain)
    remarks = []
    if others:
        remarks.append(f"images converted to {kind}: {others} of {modes.total()} looked at")
    values = sorted(set(used["train"][label][:]) - {None, -1})
    splits = {
        split: Split(
            _reader(encoded[split], column, split, mode),
            _labels(rows[label][:], values, f"{split} images of {shown}"),
        )
        for split, rows in used.items()
    }
    train, test = splits["train"], splits.get("test")
    if test is None:
        train, test = _cut_test(train, TEST_SHARE, shown)
        remarks.append(f"no test split: {TEST_SHARE:.0%} of the images of each class are cut off")
    named = getattr(used["train"].features[label], "int2str", str)
    classes = tuple(str(named(value)) for value in values)
    return ImageData(shown, classes, kept, train, test, tuple(remarks))


def _opened(name: str, path: Path) -> dict[str, Any]:
    """Return the splits of a data set as tables of ``datasets``."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    datasets.disable_progress_bars()  # they would tear the study's own
    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    if not path.exists() and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no folder or file {name}; {did_you_mean(path.name, ['digits', *near])}")
    try:
        return _opened_path(path) if path.exists() else dict(datasets.load_dataset(name))
    except DataError:
        raise
    except Exception as error:  # datasets passes on whatever a format's reader, or the hub, raised
        if path.exists():
            raise DataError(
                f"{name} cannot be read as labelled images ({first_line(error)}): pass folders "
                "train/CLASS/image.png, or parquet files with a column image and a column label"
            ) from error
        raise DataError(
            f"{name!r} is no folder or file here, and the hub did not give it "
            f"({type(error).__name__}: no network, or no such data set); "
            f"{did_you_mean(name, ('digits', *HUB_EXAMPLES))}"
        ) from error


def _opened_path(path: Path) -> dict[str, Any]:
    from datasets import Dataset, load_dataset, load_from_disk

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = load_from_disk(str(path))
        return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    files: dict[str, list[str]] = {}
    for file in [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet")):
        parts = (file.name.lower(), file.parent.name.lower())
        known = (n for n in ("train", *TEST_NAMES) if any(p.startswith(n) for p in parts))
        files.setdefault(next(known, "train"), []).append(str(file))
    if files:
        return dict(load_dataset("parquet", data_files=files))
    if not path.is_dir() or not any(entry.is_dir() for entry in path.iterdir()):
        raise DataError(
            f"{path} holds neither parquet files nor folders of images; expected "
            "train/CLASS/image.png, CLASS/image.png or train*.parquet"
        )
    return dict(load_dataset("imagefolder", data_dir=str(path), drop_labels=False))


def _columns(rows: Any, shown: str) -> tuple[str, str]:
    """Return the names of the image column and of the label column."""
    from datasets import ClassLabel, Image

    features = rows.features
    # A parquet column may hold encoded images without saying so in its metadata.
    images = [
        name
        for name, kind in features.items()
        if isinstance(kind, Image)
        or (isinstance(kind, dict) and "bytes" in kind)
        or "binary" in str(getattr(kind, "dtype", ""))
    ]
    labels = [n for n in LABEL_NAMES if n in features]
    labels += [n for n, kind in features.items() if isinstance(kind, ClassLabel)]
    if not images or not labels:
        raise DataError(
            f"{shown} has no {'label' if images else 'image'} column among {', '.join(features)}; "
            "name one `image` (an Image, or its bytes) and one `label`"
        )
    return images[0], labels[0]


def _labels(found: list[Any], values: list[Any], where: str) -> Tensor:
    number = {value: i for i, value in enumerate(values)}
    strange = set(found) - set(number)
    if strange:
        raise DataError(
            f"{where} have the label {strange.pop()!r}, which no training image has; None or -1 is "
            "none: label these images, or remove them"
        )
    return torch.tensor([number[value] for value in found], dtype=torch.int64)


def _image(entry: dict[str, Any], which: str, mode: str | None = None) -> PIL.Image.Image:
    """Return an image in a mode of Pillow's; without one, its pixels are not decoded yet."""
    data, path = entry.get("bytes"), entry.get("path")
    try:
        image = PIL.Image.open(io.BytesIO(data) if data is not None else str(path))
        if mode is None:
            return image
        if image.mode.startswith(("I", "F")):  # Pillow would clip these to 8 bits without a word
            raise DataError(f"{path or which} has {image.mode} pixels; save it with 8 bits")
        return image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path or which} cannot be read; remove or repair it") from error


def _reader(rows: Any, column: str, split: str, mode: str) -> Callable[[int], Tensor]:
    def read(i: int) -> Tensor:
        image = _image(rows[i][column], f"image {i} of the {split} split", mode)
        pixels: Tensor = v2.functional.pil_to_tensor(image)
        return pixels

    return read
