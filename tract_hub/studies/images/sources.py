"""Find a data set by its name and check that a classifier can be trained on it."""

from __future__ import annotations

from dataclasses import replace

import torch

from tract_hub.errors import DataError
from tract_hub.studies.images.rows import load_rows
from tract_hub.studies.images.splits import Source, Split, at_most, of_classes, stratified

DIGITS_TEST_IMAGES = 450


def load_source(
    name: str,
    channels: int | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
    classes: tuple[int, ...] | None = None,
) -> Source:
    """Open a data set.

    Args:
        name: ``"digits"``, a path (image folder, parquet, saved dataset), or a hub name.
        channels: 1 or 3 converts every image; None keeps what is there.
        max_train: keep so many training images, drawn once with a fixed seed.
        max_test: the same for the test images.
        classes: keep only these, counted from 0; None keeps all.

    Raises:
        DataError: nothing there, unreadable, one class, no such class, or an empty split.

    """
    source = _digits(channels or 1) if name == "digits" else load_rows(name, channels)
    source = source if classes is None else _only(source, sorted(classes))
    train = at_most(source.train, max_train)
    source = replace(source, train=train, test=at_most(source.test, max_test))
    _check(source)
    return source


def _digits(channels: int) -> Source:
    """Return 1797 handwritten digits of 8 × 8 grey pixels in 17 levels, from scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = torch.from_numpy(bunch.images)[:, None]
    images = (levels * (255 / 16)).round().to(torch.uint8).expand(-1, channels, -1, -1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = stratified(Split("train", images.__getitem__, labels), DIGITS_TEST_IMAGES)
    return Source("digits", train, test, tuple("0123456789"), channels)


def _only(source: Source, classes: list[int]) -> Source:
    if classes[-1] >= len(source.classes):
        raise DataError(
            f"{source.name} has {len(source.classes)} classes, none {classes[-1]}: --classes "
            "counts them from 0"
        )
    return replace(
        source,
        train=of_classes(source.train, classes),
        test=of_classes(source.test, classes),
        classes=tuple(source.classes[i] for i in classes),
    )


def _check(source: Source) -> None:
    if not len(source.test):
        raise DataError(
            f"the test split of {source.name} is empty; give it images, or other --classes"
        )
    found = sorted(set(source.train.labels.tolist()))
    if len(found) < 2:
        raise DataError(
            f"the {len(source.train)} training images of {source.name} are all of one class; "
            "a classifier needs two or more (check the labels, or raise --max-train)"
        )
    strangers = sorted(set(source.test.labels.tolist()) - set(found))
    if strangers:
        raise DataError(
            f"{source.name}: no training image has the test images' class "
            f"{source.classes[strangers[0]]} (check the labels, or raise --max-train)"
        )
