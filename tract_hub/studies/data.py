"""Labelled images from anywhere, as batches of uint8 tensors."""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from tract_hub.errors import DataError, first_line
from tract_hub.names import did_you_mean

LOG = logging.getLogger(__name__)
TEST_NAMES = ("test", "validation", "valid", "val", "eval")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "class_id")
HUB_EXAMPLES = ("uoft-cs/cifar10", "uoft-cs/cifar100", "ylecun/mnist")
TEST_SHARE = 0.2
SPLIT_SEED = 0
"""The same split, and the same part of it, in every run of every study."""
MEMORY_LIMIT = 2**30
"""Bytes of uint8 pixels above which images are read again for each batch."""
LOOKED_AT = 1000
"""Images whose modes and sizes decide for all: opening a header takes about 0.1 ms."""
UNEVEN = 2
"""Largest class over smallest, in the test images, from which on accuracy is balanced."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Split:
    """Some images and their labels.

    Attributes:
        read: returns image i, uint8, channels × height × width.
        labels: classes as int64, one an image.
        pixels: all images in one tensor, where they are in memory.

    """

    read: Callable[[int], Tensor]
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
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        chosen = torch.randperm(len(self), generator=generator)[:count]
        return self.part(sorted(chosen.tolist()))


@dataclass(frozen=True)
class ImageData:
    """A data set.

    Attributes:
        name: as results show it.
        classes: their names, in the order of the labels.
        channels: of every image, 1 or 3.
        train: images to train on.
        test: images that accuracy is measured on.
        remarks: what was done to the images, in words.
        native_size: side in pixels, where the images are square and of one size.
        mean: by channel, of pixels in [0, 1]; after :func:`fit`.
        std: their deviation.

    """

    name: str
    classes: tuple[str, ...]
    channels: int
    train: Split
    test: Split
    remarks: tuple[str, ...] = ()
    native_size: int | None = None
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
    """Open a data set.

    Args:
        name: ``"digits"`` (of scikit-learn), a folder of images, parquet files, a saved data set,
            or a name on the Hugging Face hub. Without a test split, a fifth of train becomes one.
        channels: 1 or 3 converts every image; None keeps what they are, RGB where that differs.
        max_train: keep so many training images.
        max_test: the same for the test images.

    Raises:
        DataError: nothing there, unreadable, or nothing that a classifier can be trained on.

    Example:
        >>> load_images("digits").counts["test"][:3]
        [45, 46, 44]

    """
    data = _digits(channels or 1) if name == "digits" else _from_datasets(name, channels)
    data = replace(data, train=data.train.at_most(max_train), test=data.test.at_most(max_test))
    seen = set(data.train.labels.tolist())
    if len(seen) < 2:
        raise DataError(
            f"the {len(data.train)} training images of {data.name} are all of one class; a "
            "classifier needs two or more (check the labels, or raise --max-train)"
        )
    strangers = sorted(set(data.test.labels.tolist()) - seen)
    if strangers:
        raise DataError(
            f"{data.name}: no training image has the test images' class "
            f"{data.classes[strangers[0]]!r} (check the labels, or raise --max-train)"
        )
    if not len(data.test):
        raise DataError(f"the test split of {data.name} is empty; give it images")
    return replace(data, native_size=_native_size(data.train))


def fit(data: ImageData, size: int) -> ImageData:
    """Bring a data set to an image size, in memory where it fits, and measure mean and deviation.

    Args:
        data: as it was loaded.
        size: side in pixels. Other images are resized (shorter side, bilinear, antialiased) and
            cropped to their central square.

    Raises:
        DataError: an image cannot be read.

    """
    needed = (len(data.train) + len(data.test)) * data.channels * size**2
    train, test = (_resized(s, size, needed <= MEMORY_LIMIT) for s in (data.train, data.test))
    step = max(1, len(train) // 10_000)
    sums = torch.zeros(2, data.channels, dtype=torch.float64)
    for i in range(0, len(train), step):
        pixels = train.read(i).double().flatten(1) / 255
        sums += torch.stack([pixels.mean(1), pixels.square().mean(1)])
    mean, square = sums / len(range(0, len(train), step))
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
        images = (
            torch.stack([split.read(i) for i in indices])
            if split.pixels is None
            else split.pixels[indices]
        )
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
    split: Split, size: int, batch_size: int, *, train: bool, augment: bool, workers: int | None
) -> DataLoader[Batch]:
    """Return the batches of a split: shuffled and without a smaller last one to train on.

    Args:
        split: fitted images.
        size: their side in pixels.
        batch_size: images in a batch.
        train: to train on, or to test.
        augment: whether to crop and flip.
        workers: processes that read images which are not in memory; None chooses.

    """
    many = min(8, (os.cpu_count() or 2) - 1) if workers is None else workers
    return DataLoader(
        Loaded(split, size, augment),
        batch_size=batch_size,
        shuffle=train,
        drop_last=train,
        generator=torch.Generator(),
        collate_fn=_as_fetched,
        num_workers=0 if split.pixels is not None else many,
    )


def _as_fetched(batch: Any) -> Any:
    return batch


def photographs(batch: int, size: int, channels: int = 3) -> Tensor:
    """Crops of scikit-learn's two photographs, standardised: (batch, channels, size, size).

    Noise would not do to time TrAct: the Gram matrix of neighbouring pixels is badly conditioned.
    """
    from sklearn.datasets import load_sample_images

    images = [torch.tensor(i).permute(2, 0, 1).float() for i in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(batch):
        image = images[i % len(images)]
        y, x = (int(torch.randint(n - size + 1, (), generator=generator)) for n in image.shape[1:])
        crops.append(image[:channels, y : y + size, x : x + size])
    pixels = torch.stack(crops)
    return (pixels - pixels.mean()) / pixels.std()


def _digits(channels: int) -> ImageData:
    """Return 1797 handwritten digits of 8 × 8 grey pixels in 17 levels, 450 of them to test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = torch.from_numpy(bunch.images)[:, None]
    images = (levels * (255 / 16)).round().to(torch.uint8).expand(-1, channels, -1, -1)
    whole = Split(images.__getitem__, torch.from_numpy(bunch.target).long())
    train, test = _cut_test(whole, 450, "digits")
    return ImageData("digits", tuple("0123456789"), channels, train, test)


def _cut_test(whole: Split, test_size: float | int, name: str) -> tuple[Split, Split]:
    from sklearn.model_selection import train_test_split

    try:
        parts = train_test_split(
            range(len(whole)), test_size=test_size, stratify=whole.labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise DataError(
            f"{name} has no test split, and none can be cut from train ({error}): add a folder or "
            "file named test, or more images of each class"
        ) from error
    train, test = (whole.part(sorted(part)) for part in parts)
    return train, test


def _from_datasets(name: str, channels: int | None) -> ImageData:
    from datasets import Image

    path = Path(name).expanduser()
    shown = path.resolve().name if path.exists() else name
    rows = _opened(name)
    if "train" not in rows:
        raise DataError(f"{shown} has no train split, only {', '.join(rows)}; name one train")
    image, label = _columns(rows["train"], shown)
    values = sorted(set(rows["train"][label][:]) - {None, -1})
    names = tuple(_class_name(rows["train"].features[label], value) for value in values)
    test_name = next((n for n in TEST_NAMES if n in rows), "")
    used = {"train": rows["train"], **({"test": rows[test_name]} if test_name else {})}
    encoded = {
        split: table.select_columns([image]).cast_column(image, Image(decode=False))
        for split, table in used.items()
    }
    modes = sum((_modes(table, image, split) for split, table in encoded.items()), Counter())
    kept = channels or (1 if set(modes) <= {"1", "L"} else 3)
    splits = {
        split: Split(
            _reader(encoded[split], image, split, kept),
            _labels(table[label][:], values, shown, split),
        )
        for split, table in used.items()
    }
    remarks = list(_conversion(modes, kept))
    if not test_name:
        splits["train"], splits["test"] = _cut_test(splits["train"], TEST_SHARE, shown)
        remarks.append(f"no test split: {TEST_SHARE:.0%} of the images of each class are cut off")
    return ImageData(shown, names, kept, splits["train"], splits["test"], tuple(remarks))


def _opened(name: str) -> dict[str, Any]:
    """Return the splits of a data set as tables of ``datasets``."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    datasets.disable_progress_bars()  # they would tear the study's own
    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    path = Path(name).expanduser()
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if not path.exists() and is_path:
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no folder or file {name}; {did_you_mean(path.name, ['digits', *near])}")
    try:
        if path.exists():
            return _opened_path(path)
        return dict(datasets.load_dataset(name))
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
    parquet = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet"))
    if parquet:
        files: dict[str, list[str]] = {}
        for file in parquet:
            parts = (file.name.lower(), file.parent.name.lower())
            known = ("train", *TEST_NAMES)
            split = next((n for n in known if any(p.startswith(n) for p in parts)), "train")
            files.setdefault(split, []).append(str(file))
        return dict(load_dataset("parquet", data_files=files))
    if not path.is_dir() or not any(entry.is_dir() for entry in path.iterdir()):
        raise DataError(
            f"{path} holds neither parquet files nor folders of images; expected "
            "train/CLASS/image.png, CLASS/image.png or train*.parquet"
        )
    return dict(load_dataset("imagefolder", data_dir=str(path), drop_labels=False))


def _columns(table: Any, shown: str) -> tuple[str, str]:
    """Return the names of the image column and of the label column."""
    from datasets import ClassLabel, Image

    features = table.features
    images = [n for n, f in features.items() if isinstance(f, Image) or _holds_bytes(f)]
    labels = [n for n in LABEL_NAMES if n in features]
    labels += [n for n, f in features.items() if isinstance(f, ClassLabel)]
    if not images or not labels:
        raise DataError(
            f"{shown} has no {'label' if images else 'image'} column among {', '.join(features)}; "
            "name one `image` (an Image, or its bytes) and one `label`"
        )
    return images[0], labels[0]


def _holds_bytes(feature: Any) -> bool:
    """Whether a parquet column holds encoded images without saying so in its metadata."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _class_name(feature: Any, value: Any) -> str:
    return str(feature.int2str(int(value)) if hasattr(feature, "int2str") else value)


def _labels(found: list[Any], values: list[Any], shown: str, split: str) -> Tensor:
    number = {value: i for i, value in enumerate(values)}
    strangers = {value for value in found if value not in number}
    if strangers & {None, -1}:
        raise DataError(f"some {split} images of {shown} have no label; remove or label them")
    if strangers:
        raise DataError(f"{shown}: no training image has the {split} class {strangers.pop()!r}")
    return torch.tensor([number[value] for value in found], dtype=torch.int64)


def _open(entry: dict[str, Any], which: str) -> Any:
    """Return an image as Pillow sees it, its pixels not yet decoded."""
    from PIL import Image

    data, path = entry.get("bytes"), entry.get("path")
    try:
        return Image.open(io.BytesIO(data) if data is not None else str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path or which} cannot be read; remove or repair it") from error


def _modes(table: Any, column: str, split: str) -> Counter[str]:
    """Count the modes of images, of evenly chosen ones where they are many."""
    step = max(1, len(table) // LOOKED_AT)
    return Counter(
        _open(table[i][column], f"image {i} of the {split} split").mode
        for i in range(0, len(table), step)
    )


def _conversion(modes: Counter[str], channels: int) -> Iterator[str]:
    """Say what conversion loses or adds."""
    plain = {1: {"1", "L"}, 3: {"RGB"}}[channels]
    other = ", ".join(f"{count} {mode}" for mode, count in modes.most_common() if mode not in plain)
    if other:
        yield (
            f"images converted to {'RGB' if channels == 3 else 'grey'}: {other} of "
            f"{modes.total()} looked at"
        )


def _reader(table: Any, column: str, split: str, channels: int) -> Callable[[int], Tensor]:
    def read(i: int) -> Tensor:
        from torchvision.transforms.v2.functional import pil_to_tensor

        entry, which = table[i][column], f"image {i} of the {split} split"
        image = _open(entry, which)
        if image.mode.startswith(("I", "F")):  # Pillow would clip these to 8 bits without a word
            raise DataError(
                f"{entry.get('path') or which} has {image.mode} pixels; save the images with 8 bits"
            )
        try:
            pixels: Tensor = pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            path = entry.get("path") or which
            raise DataError(f"{path} cannot be read; remove or repair it") from error
        return pixels

    return read


def _native_size(split: Split) -> int | None:
    shapes = {tuple(split.read(i).shape[1:]) for i in range(min(64, len(split)))}
    height, width = shapes.pop()
    return int(height) if not shapes and height == width else None


def _resized(split: Split, size: int, in_memory: bool) -> Split:
    def read(i: int) -> Tensor:
        image = split.read(i)
        if tuple(image.shape[1:]) == (size, size):
            return image
        image = v2.functional.resize(image, [size], antialias=True)
        cropped: Tensor = v2.functional.center_crop(image, [size, size])
        return cropped

    if not in_memory:
        return Split(read, split.labels)
    pixels = torch.stack([read(i) for i in range(len(split))])
    return Split(pixels.__getitem__, split.labels, pixels)
