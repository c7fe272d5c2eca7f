"""Images from anywhere: conversions that are told, and errors that name the file."""

import numpy as np
import pytest
import torch
from PIL import Image

from tract_hub.errors import DataError
from tract_hub.studies.data import Loaded, fit, load_images


def test_mixed_modes_become_rgb_and_it_is_said(image_folder):
    data = load_images(str(image_folder(("RGB", "RGBA", "L", "P", "CMYK"))))
    assert data.channels == 3
    (remark,) = data.remarks
    assert "converted to RGB" in remark
    for mode in ("RGBA", "L", "P", "CMYK"):
        assert mode in remark


def test_grey_images_stay_grey(image_folder):
    data = load_images(str(image_folder(("L",))))
    assert (data.channels, data.remarks) == (1, ())


def test_uneven_classes_are_balanced(image_folder):
    data = load_images(str(image_folder(classes=(9, 3))))
    assert data.counts == {"train": [9, 3], "test": [9, 3]}
    assert data.balanced


@pytest.mark.parametrize("damage", ["cut", "deep"])
def test_an_error_names_the_file(image_folder, damage):
    folder = image_folder()
    victim = folder / "train" / "class1" / "3.png"
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:60])
    else:
        Image.fromarray(np.full((16, 16), 40_000, dtype=np.uint16)).save(victim)
    with pytest.raises(DataError, match=r"class1/3\.png"):
        fit(load_images(str(folder)), 16)


def test_what_is_not_there_is_said_with_the_nearest_name(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(DataError, match="did you mean flowers"):
        load_images(str(tmp_path / "flower"))
    with pytest.raises(DataError, match="neither parquet files nor folders"):
        load_images(str(tmp_path / "flowers"))


def test_pixels_are_scaled_as_asked():
    data = fit(load_images("digits"), 8)
    images = data.train.pixels
    standard = data.normalise("standard")(images)
    assert abs(float(standard.mean())) < 1e-5
    assert abs(float(standard.std()) - 1) < 1e-3
    assert float(data.normalise("unit")(images).max()) == 1.0
    assert float(data.normalise("bytes")(images).max()) == 255.0


def test_augmentation_depends_on_seed_and_image_alone():
    data = fit(load_images("digits"), 8)
    images = Loaded(data.train, 8, augment=True)
    images.draw(5)
    whole = images.__getitems__(list(range(10)))[0]
    torch.testing.assert_close(images.__getitems__([3, 7])[0], whole[[3, 7]])
    images.draw(6)
    assert not torch.equal(images.__getitems__(list(range(10)))[0], whole)
