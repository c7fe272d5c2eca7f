"""Bad input: one clear line on stderr, exit status 2, and nothing that looks like a result."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.studies.conftest import TINY, picture
from tract_hub.cli import main


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that ``tract-hub compare`` printed before it exited with 2."""
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments, "--out", "refused"])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("tract-hub: ")
    assert not list(Path("refused").glob("*")), "something was written"
    return lines[0]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--lam", "0", "--lam must be a finite number greater than 0, got 0"),
        ("--lam", "-1", "--lam must be a finite number greater than 0, got -1"),
        ("--lam", "inf", "--lam must be a finite number greater than 0, got inf"),
        ("--lam", "nan", "--lam must be"),
        ("--lam", "much", "--lam must be numbers"),
        ("--lam", "0.1,0.1", "--lam has a value twice"),
        ("--lam", ",", "--lam needs at least one value"),
        ("--patch-norm", "layer", "--patch-norm must be one of none, patch, dual"),
        ("--normalise", "zero", "--normalise must be one of standard, unit, bytes"),
        ("--stem-optimizer", "adam", "--stem-optimizer must be one of same, sgd"),
        ("--stem-lr", "0", "--stem-lr must be"),
        ("--classes", "3", "--classes needs two or more"),
        ("--classes", "8-12", "digits has 10 classes, none 12"),
        ("--weights", "nowhere.safetensors", "is no safetensors file"),
        ("--lr", "0", "--lr must be"),
        ("--lr", "nan", "--lr must be"),
        ("--lr", "fast", "--lr"),
        ("--epochs", "0", "--epochs must be 1 or more"),
        ("--batch-size", "0", "--batch-size must be 1 or more"),
        ("--max-train", "0", "--max-train must be 1 or more"),
        ("--image-size", "-8", "--image-size must be 1 or more"),
        ("--seeds", "1,1", "--seeds has a value twice"),
        ("--seeds", "-1", "--seeds"),
        ("--seeds", "one", "--seeds must be whole numbers"),
        ("--seeds", "4-2", "--seeds needs at least one value"),
        ("--channels", "2", "--channels must be 1 or 3"),
        ("--momentum", "1", "--momentum must lie in [0, 1)"),
        ("--label-smoothing", "1", "--label-smoothing must lie in [0, 1)"),
        ("--weight-decay", "-1", "--weight-decay must be"),
        ("--warmup-epochs", "1000", "--warmup-epochs 1000 leaves nothing"),
        ("--workers", "-1", "--workers must be 0 or more"),
        ("--schedule", "cosin", "--schedule must be one of cosine"),
        ("--stem", "imagenet", "--stem must be one of published, cifar"),
        ("--augment", "lots", "--augment must be one of none, crop-flip"),
        ("--precision", "fp8", "--precision must be one of fp32"),
        ("--recipe", "digit-vit", "did you mean digits-vit"),
        ("--model-arg", "depth", "--model-arg must look like depth=4"),
        ("--colour", "red", "No such option"),
    ],
)
def test_option_values_that_make_no_sense(capsys, option, value, says):
    assert says in refusal(capsys, option, value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--model resnet81", "did you mean"),
        ("--model resnet81", "resnet18"),
        ("--model ./no-such-folder", "no model folder"),
        ("--model owner/name", "pass a timm name, or a local folder"),
        ("--model-arg colour=3", "cannot be built"),
        ("--model-arg in_chans=3", "in_chans=3, but the data have 1"),
        ("--stem cifar", "use --stem published"),
        ("--image-size 2", "vit_tiny_patch16_224"),
        ("--optimizer adan2", "did you mean"),
        ("--data digit", "did you mean digits"),
        ("--data ./nowhere/images", "no folder or file"),
        ("--data owner/images", "no network, or no such data set"),
        ("--batch-size 5000", "more than the 1347 training images; lower it"),
        ("--max-train 1", "one class"),
        ("--max-train 5", "no training image has the test images' class"),
        ("--device cuda:77", "no device 'cuda:77'"),
        ("--device gpu", "no device 'gpu'"),
        ("--precision fp16 --device cpu", "--precision fp16 needs a GPU"),
    ],
)
def test_models_data_and_devices_that_are_not_there(capsys, arguments, says):
    assert says in refusal(capsys, *arguments.split())


def test_a_mistyped_folder_gets_its_neighbours_names(capsys, image_folder):
    folder = image_folder()
    assert "did you mean images" in refusal(capsys, "--data", str(folder.with_name("image")))


def test_an_unreadable_image_is_named(capsys, image_folder):
    folder = image_folder()
    (folder / "cat" / "3.png").write_bytes(b"no picture")
    assert "3.png" in refusal(capsys, "--data", str(folder))


def test_one_class_is_not_enough(capsys, image_folder):
    assert "one class" in refusal(capsys, "--data", str(image_folder("cat")))


def test_a_folder_without_images(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    assert "expected train/CLASS/image.png" in refusal(capsys, "--data", str(tmp_path))
    (tmp_path / "cat").mkdir()
    assert "cannot be read as labelled images" in refusal(capsys, "--data", str(tmp_path))


def test_a_file_that_is_no_parquet(capsys, tmp_path):
    picture(0).save(tmp_path / "one.png")
    assert "one.png is no parquet file" in refusal(capsys, "--data", str(tmp_path / "one.png"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR0")
    line = refusal(capsys, "--data", str(tmp_path / "broken.parquet"))
    assert "cannot be read as labelled images" in line


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image": [], "label": []}, "is empty"),
        ({"label": [0, 1]}, "no image column among label"),
        ({"image": ["picture", "picture"]}, "no label column among image"),
        ({"image": ["picture", "picture"], "label": [0, None]}, "have no label"),
        ({"image": ["picture", "picture"], "label": [0, -1]}, "have no label"),
    ],
)
def test_a_parquet_file_without_what_training_needs(capsys, tmp_path, columns, says):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    kinds = {"image": ImageFeature(), "label": Value("int64")}
    data = {n: [picture(0) if v == "picture" else v for v in vs] for n, vs in columns.items()}
    features = Features({name: kinds[name] for name in columns})
    Dataset.from_dict(data, features=features).to_parquet(tmp_path / "train.parquet")
    assert says in refusal(capsys, "--data", str(tmp_path))


def test_deep_pixels_are_not_clipped_in_silence(capsys, image_folder):
    folder = image_folder()
    Image.new("I;16", (12, 12)).save(folder / "cat" / "0.png")
    line = refusal(capsys, "--data", str(folder), "--channels", "1")
    assert "convert the images to 8-bit" in line


def hf_folder(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "no-such-model"}, "is not understood"),
        ({"model_type": "bert"}, "cannot be built"),
    ],
)
def test_model_folders_that_are_no_image_classifier(capsys, tmp_path, config, says):
    assert says in refusal(capsys, "--model", str(hf_folder(tmp_path / "model", **config)))


def test_a_model_folder_without_config(capsys, tmp_path):
    assert "no config.json" in refusal(capsys, "--model", str(tmp_path))


def test_pickled_weights_are_not_loaded(capsys, tmp_path):
    folder = hf_folder(tmp_path / "model", model_type="vit")
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "safetensors" in refusal(capsys, "--model", str(folder))


def test_weights_for_other_channels(capsys, tmp_path):
    folder = hf_folder(tmp_path / "model", model_type="vit", num_channels=3)
    (folder / "model.safetensors").write_bytes(b"")
    line = refusal(capsys, "--model", str(folder))
    assert "3 channels and the images have 1; convert them with --channels 3" in line


def test_an_out_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["compare", *TINY, "--out", str(tmp_path / "file" / "deeper")])
    assert stop.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_packages_are_named_in_one_line(capsys, monkeypatch, package):
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'tract-hub[studies]'" in refusal(capsys)
