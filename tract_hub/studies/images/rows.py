"""Labelled images that the ``datasets`` library can open: folders, parquet, saved, the hub."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tract_hub.errors import DataError, first_line
from tract_hub.names import did_you_mean, shown_name
from tract_hub.studies.images.pixels import Kind, open_image, pixels
from tract_hub.studies.images.splits import Source, Split, stratified

TEST_SHARE = 0.2
TEST_NAMES = ("test", "validation", "valid", "val", "eval")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "class_id")
HUB_EXAMPLES = (
    "uoft-cs/cifar10",
    "uoft-cs/cifar100",
    "ylecun/mnist",
    "zalando-datasets/fashion_mnist",
)


def load_rows(name: str, channels: int | None) -> Source:
    """Open a path or a hub name; without a test split, a fifth of train becomes one.

    Args:
        name: of a parquet file, a folder, or a data set on the hub.
        channels: 1 or 3 converts every image; None keeps what is there.

    Raises:
        DataError: nothing there, or nothing with images and labels.

    """
    shown = shown_name(name)
    splits = _opened(name)
    train_rows = splits.get("train")
    if train_rows is None:
        raise DataError(f"{shown} has no train split, only {', '.join(splits)}; name one train")
    columns = _columns(train_rows, shown)
    values = _class_values(train_rows, columns[1], shown)
    kind = Kind(channels or _channels_of(train_rows, columns[0]), lossy=channels is not None)
    train = _split("train", train_rows, columns, values, kind)
    test_name = next((n for n in TEST_NAMES if n in splits), None)
    if test_name is None:
        train, test = stratified(train, TEST_SHARE)
    else:
        test = _split("test", splits[test_name], columns, values, kind)
    return Source(shown, train, test, _class_names(train_rows, columns[1], values), kind.channels)


def _opened(name: str) -> dict[str, Any]:
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    # The study shows its own progress, which the libraries' bars and retries would tear.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        return _open(name)
    except DataError:
        raise
    except Exception as error:  # datasets passes on whatever the format's own reader raised
        raise DataError(
            f"{name} cannot be read as labelled images ({first_line(error)}): pass folders "
            "train/CLASS/image.png, or parquet files with a column image and a column label"
        ) from error


def _open(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    if path.is_file():
        return _open_parquet({"train": [path]})
    if path.is_dir():
        return _open_folder(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no folder or file {name}; {did_you_mean(path.name, ['digits', *near])}")
    return _open_hub(name)


def _open_parquet(files: dict[str, list[Path]]) -> dict[str, Any]:
    from datasets import load_dataset
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    for paths in files.values():
        wrong = [path.name for path in paths if path.suffix != ".parquet"]
        if wrong:
            raise DataError(f"{wrong[0]} is no parquet file; pass one, or a folder of images")
    for split, paths in files.items():
        # datasets calls a split without rows an instruction that corresponds to no data.
        if not sum(ParquetFile(path).metadata.num_rows for path in paths):
            raise DataError(f"the {split} split in {paths[0].name} is empty; give it images")
    names = {split: [str(path) for path in paths] for split, paths in files.items()}
    return dict(load_dataset("parquet", data_files=names))


def _open_folder(path: Path) -> dict[str, Any]:
    from datasets import Dataset, load_dataset, load_from_disk

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = load_from_disk(str(path))
        return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    parquet = sorted(path.rglob("*.parquet"))
    if parquet:
        return _open_parquet(_by_split(parquet))
    if not any(entry.is_dir() for entry in path.iterdir()):
        raise DataError(
            f"{path} holds neither parquet files nor folders of images; "
            "expected train/CLASS/image.png, CLASS/image.png or train*.parquet"
        )
    return dict(load_dataset("imagefolder", data_dir=str(path), drop_labels=False))


def _by_split(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Sort parquet files into splits by the beginning of their names or their folder's."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        parts = (file.name.lower(), file.parent.name.lower())
        known = (n for n in ("train", *TEST_NAMES) if any(p.startswith(n) for p in parts))
        splits.setdefault(next(known, "train"), []).append(file)
    return splits


def _open_hub(name: str) -> dict[str, Any]:
    from datasets import load_dataset

    try:
        return dict(load_dataset(name))
    except Exception as error:  # no network, no such name, gated: the hub says no in many ways
        raise DataError(
            f"{name!r} is no folder or file here, and the hub did not give it "
            f"({type(error).__name__}: no network, or no such data set); "
            f"{did_you_mean(name, ('digits', *HUB_EXAMPLES))}"
        ) from error


def _columns(rows: Any, shown: str) -> tuple[str, str]:
    """Return the names of the image column and the label column."""
    from datasets import ClassLabel, Image

    features = rows.features
    images = [n for n, f in features.items() if isinstance(f, Image) or _is_bytes(f)]
    labels = [n for n in LABEL_NAMES if n in features]
    labels += [n for n, f in features.items() if isinstance(f, ClassLabel) and n not in labels]
    if not images or not labels:
        missing = "label" if images else "image"
        raise DataError(
            f"{shown} has no {missing} column among {', '.join(features)}; "
            "name one `image` (an Image, or its bytes) and one `label`"
        )
    return images[0], labels[0]


def _is_bytes(feature: Any) -> bool:
    """Tell whether a parquet column holds encoded images without saying so in metadata."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _class_values(rows: Any, column: str, shown: str) -> list[Any]:
    values = set(rows[column][:])
    if None in values or -1 in values:
        raise DataError(f"some rows of {shown} have no label; remove them or label them")
    return sorted(values)


def _class_names(rows: Any, column: str, values: list[Any]) -> tuple[str, ...]:
    from datasets import ClassLabel

    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.int2str(int(value)) for value in values)
    return tuple(str(value) for value in values)


def _split(name: str, rows: Any, columns: tuple[str, str], values: list[Any], kind: Kind) -> Split:
    index = {value: i for i, value in enumerate(values)}
    found = rows[columns[1]][:]
    strangers = sorted(set(found) - set(index))
    if strangers:
        raise DataError(
            f"no training image has the {name} images' class {strangers[0]!r}: check the labels"
        )
    encoded = _undecoded(rows, columns[0])

    def read(i: int) -> Tensor:
        return pixels(encoded[i][columns[0]], kind, f"image {i} of the {name} split")

    return Split(name, read, torch.tensor([index[value] for value in found], dtype=torch.int64))


def _undecoded(rows: Any, column: str) -> Any:
    """Leave decoding to :func:`pixels`, which can say which image it was."""
    from datasets import Image

    return rows.select_columns([column]).cast_column(column, Image(decode=False))


def _channels_of(rows: Any, column: str) -> int:
    """Return 1 when the first 64 images are all grey, else 3."""
    encoded = _undecoded(rows, column)
    few = range(min(64, len(rows)))
    modes = {open_image(encoded[i][column], f"image {i} of the train split").mode for i in few}
    return 1 if modes <= {"1", "L"} else 3
