from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from tests.studies.conftest import picture
from tract_hub.errors import DataError
from tract_hub.studies.images import prepared as data_module
from tract_hub.studies.images.prepared import prepare, train_loader
from tract_hub.studies.images.prepared import test_loader as loader_of_tests
from tract_hub.studies.images.sources import load_source


def test_digits_split_is_stratified_and_always_the_same():
    first, second = load_source("digits"), load_source("digits")
    assert (len(first.train), len(first.test)) == (1347, 450)
    assert torch.equal(first.train.labels, second.train.labels)
    counts = torch.bincount(first.test.labels)
    shares = (torch.bincount(first.train.labels) + counts) * 450 / 1797
    assert counts.tolist() == pytest.approx(shares.tolist(), abs=1)
    assert first.train.read(0).shape == (1, 8, 8)
    assert first.train.read(0).dtype == torch.uint8
    pixels = {first.train.read(i).numpy().tobytes() for i in range(1347)}
    assert not any(first.test.read(i).numpy().tobytes() in pixels for i in range(450))


def test_images_are_normalised_by_the_training_split_alone(image_folder):
    root = image_folder("cat dog", under="train")
    for name in ("cat", "dog"):
        folder = root / "test" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (12, 12), "white").save(folder / "0.png")
    prepared = prepare(load_source(str(root)), 12)
    batch = torch.stack([prepared.train.read(i) for i in range(len(prepared.train))])
    seen = prepared.normaliser()(batch)
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_a_channel_that_never_changes_is_not_divided_by_zero(image_folder):
    root = image_folder()
    for file in root.rglob("*.png"):
        Image.new("RGB", (12, 12), (10, 20, 30)).save(file)
    prepared = prepare(load_source(str(root)), 12)
    assert torch.isfinite(prepared.normaliser()(prepared.train.read(0))).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_image_folder_without_a_test_split_is_cut_by_class(image_folder, mode):
    source = load_source(str(image_folder("cat dog eel", mode=mode)))
    assert source.classes == ("cat", "dog", "eel")
    assert source.channels == {"L": 1, "RGB": 3}[mode]
    assert torch.bincount(source.train.labels).tolist() == [16, 16, 16]
    assert torch.bincount(source.test.labels).tolist() == [4, 4, 4]
    assert source.native_size() == 12


def test_image_folder_with_splits_keeps_them(image_folder):
    image_folder("cat dog", count=3, under="train")
    source = load_source(str(image_folder("cat dog", count=2, under="val")))
    assert (len(source.train), len(source.test)) == (6, 4)


def encoded(seed: int) -> dict:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def rows(count: int = 8, labels: str = "label") -> dict:
    return {"image": [encoded(i) for i in range(count)], labels: [i % 2 for i in range(count)]}


def pixels_of(seed: int) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture(seed))).permute(2, 0, 1)


@pytest.mark.parametrize("metadata", ["image-feature", "plain-struct"])
@pytest.mark.parametrize("names", [("train", "test"), ("train-00000-of-00001", "validation-0")])
def test_a_folder_of_parquet_is_read_by_its_file_names(tmp_path, metadata, names):
    import pandas
    from datasets import Dataset
    from datasets import Image as ImageFeature

    for name, count in zip(names, (8, 4), strict=True):
        if metadata == "image-feature":
            Dataset.from_dict(rows(count)).cast_column("image", ImageFeature()).to_parquet(
                tmp_path / f"{name}.parquet"
            )
        else:
            pandas.DataFrame(rows(count)).to_parquet(tmp_path / f"{name}.parquet")
    source = load_source(str(tmp_path))
    assert (len(source.train), len(source.test)) == (8, 4)
    assert torch.equal(source.train.read(5), pixels_of(5))
    assert source.train.labels.tolist() == [0, 1] * 4


@pytest.mark.parametrize("saved", ["file", "dataset", "dict"])
def test_other_datasets_on_disk_are_read(tmp_path, saved):
    from datasets import Dataset, DatasetDict

    whole = Dataset.from_dict(rows(20, "fine_label"))
    path = tmp_path / ("one.parquet" if saved == "file" else "saved")
    if saved == "file":
        whole.to_parquet(path)
    elif saved == "dataset":
        whole.save_to_disk(path)
    else:
        DatasetDict(train=whole, test=whole.select(range(4))).save_to_disk(path)
    source = load_source(str(path))
    assert (len(source.train), len(source.test)) == ((20, 4) if saved == "dict" else (16, 4))


def test_fewer_images_are_the_same_ones_every_time():
    first, second = (load_source("digits", max_train=50, max_test=20) for _ in range(2))
    assert (len(first.train), len(first.test)) == (50, 20)
    assert torch.equal(first.train.read(7), second.train.read(7))
    # Not simply the first ones, which a sorted data set would have in one class.
    assert not torch.equal(first.train.labels, load_source("digits").train.labels[:50])


def test_images_of_other_shapes_are_resized_and_cropped(image_folder):
    root = image_folder(count=10)
    image_folder(classes="eel", count=10, size=(30, 18))
    prepared = prepare(load_source(str(root)), 9)
    assert {prepared.train.read(i).shape for i in range(24)} == {(3, 9, 9)}
    assert prepared.source.native_size() is None


def grey_among_colours(root, mode):
    picture(0, mode).save(root / "cat" / "0.png")


@pytest.mark.parametrize(
    ("mode", "channels", "ok"),
    [("L", None, True), ("RGBA", None, False), ("RGBA", 3, True), ("L", 1, True)],
)
def test_images_of_another_kind_are_converted_only_where_nothing_is_lost(
    image_folder, mode, channels, ok
):
    root = image_folder()
    grey_among_colours(root, mode)
    source = load_source(str(root), channels=channels)
    if ok:
        assert prepare(source, 12).train.read(0).shape[0] == (channels or 3)
    else:
        with pytest.raises(DataError, match=r"RGBA.*--channels"):
            prepare(source, 12)


def batches(seed: int, augment: str = "none", epochs: int = 2, workers: int = 0) -> list:
    prepared = prepare(load_source("digits", max_train=64), 8)
    loader = train_loader(prepared, augment, 16, seed, workers)
    seen = []
    for epoch in range(epochs):
        loader.dataset.set_epoch(epoch)
        seen += list(loader)
    return seen


def same(first: list, second: list) -> bool:
    return all(
        torch.equal(a, c) and torch.equal(b, d)
        for (a, b), (c, d) in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_batches_depend_on_the_seed_alone(augment):
    first = batches(0, augment)
    torch.rand(7)  # somebody else drew from the global random state
    assert same(first, batches(0, augment))
    assert not same(first, batches(1, augment))


def test_augmentation_changes_every_epoch_and_not_with_reading_processes():
    first = batches(0, "crop-flip")
    assert same(first, batches(0, "crop-flip", workers=1))
    early, late = (
        sorted(image.numpy().tobytes() for images, _ in part for image in images)
        for part in (first[:4], first[4:])
    )
    assert early != late


def test_images_too_many_for_memory_are_read_for_every_batch(image_folder, monkeypatch):
    root = str(image_folder())
    inside = prepare(load_source(root), 12)
    monkeypatch.setattr(data_module, "MEMORY_LIMIT", 1)
    outside = prepare(load_source(root), 12)
    assert (inside.in_memory, outside.in_memory) == (True, False)
    assert inside.summary() == outside.summary()
    assert same(list(loader_of_tests(inside, 4, 0)), list(loader_of_tests(outside, 4, 0)))
