"""Bad input: one clear line on stderr, exit status 2, and nothing that looks like a result."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.studies.comparisons import TINY
from tests.studies.conftest import picture
from tract_hub.cli import main
from tract_hub.studies.compare.recipes import RECIPES


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
        ("--seeds", str(2**32), "--seeds must lie in [0, 2^32), got 4294967296"),
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
        ("--recipe", "0", f"there is {', '.join(sorted(RECIPES))}"),
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
        ("--optimizer adamw --momentum 0.5", "adamw has no momentum: leave --momentum out"),
        ("--seeds 0-99999", "--seeds 0-99999 are more than"),
        ("--data digit", "did you mean digits"),
        ("--data ./nowhere/images", "no folder or file"),
        ("--data owner/images", "no network, or no such data set"),
        ("--batch-size 5000", "more than the 1347 training images; lower it"),
        ("--max-train 1", "one class"),
        ("--max-train 5", "no training image has the test images' class"),
        ("--device cuda:77", "no device 'cuda:77'"),
        ("--device gpu", "no device 'gpu'"),
        ("--precision fp16 --device cpu", "--precision fp16 needs a GPU"),
        ("--precision fp16 --device meta", "--precision fp16 does not work here, try another: "),
        ("--model resnet10t --model-arg features_only=True", "returns list, not class scores"),
        ("--model-arg global_pool=", "for two images, not (2, 10); it is no image classifier"),
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


@pytest.mark.parametrize(
    ("splits", "options", "says"),
    [
        ({"test": [0, 1]}, [], "no train split, only test; name one train"),
        ({"train": [0, 1], "test": [0, 2]}, [], "the test images' class 2: check the labels"),
        (
            {"train": [0, 1, 2], "test": [2]},
            ["--classes", "0,1"],
            "the test split of saved is empty; give it images, or other --classes",
        ),
    ],
)
def test_splits_that_do_not_fit_together(capsys, tmp_path, splits, options, says):
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": Value("int64")})
    saved = {
        name: Dataset.from_dict({"image": [picture(0)] * len(labels), "label": labels}, features)
        for name, labels in splits.items()
    }
    DatasetDict(saved).save_to_disk(tmp_path / "saved")
    capsys.readouterr()  # its progress
    assert says in refusal(capsys, "--data", str(tmp_path / "saved"), *options)


def test_one_image_of_a_class_cannot_be_cut_in_two_splits(capsys, image_folder):
    line = refusal(capsys, "--data", str(image_folder(count=1)))
    assert "no test split there, and none can be cut from train (" in line


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


def test_model_arguments_are_not_for_a_folder(capsys, tmp_path):
    folder = hf_folder(tmp_path / "model", model_type="vit")
    line = refusal(capsys, "--model", str(folder), "--model-arg", "depth=1")
    assert "--model-arg is for timm models; edit the folder's config.json" in line


def test_a_size_that_neither_images_nor_model_tell(capsys, image_folder, tmp_path):
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    folder = hf_folder(tmp_path / "model", model_type="resnet", **sizes)
    oblong = image_folder(size=(12, 9))
    line = refusal(capsys, "--data", str(oblong), "--model", str(folder))
    assert "does not say its image size; pass --image-size" in line


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


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a launcher's first process of two finds; the other never answers."""
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            "--device cuda:1",
            "--device cuda:1 is one device; for a launcher's processes, pass --device auto",
        ),
        ("--batch-size 33 --device cpu", "33 cannot be shared by 2 processes; choose a multiple"),
    ],
)
def test_what_a_launcher_s_processes_cannot_share(capsys, two_processes, arguments, says):
    assert says in refusal(capsys, *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("inspect torchvision:resnet5", "no model 'torchvision:resnet5'; did you mean torchvision"),
        ("inspect config.json", "config.json holds no configuration of Transformers ("),
        ("audit timm --only nothing*", "no model of timm is called 'nothing*'; give --only a"),
    ],
)
def test_models_that_the_other_commands_do_not_find(capsys, arguments, says):
    Path("config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


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
