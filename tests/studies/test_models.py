"""One builder for every model, and errors that say what to do."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ConvNextConfig, ViTConfig, ViTForImageClassification

import tract_hub
from tract_hub.errors import ModelError
from tract_hub.studies.models import OWN, build_model, logits_of, usual_recipe
from tract_hub.studies.settings import RECIPES
from tract_hub.studies.train import Rescaled, Step, make_accelerator

SMALL_VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
)


def folder_of(path, kind):
    config = ViTConfig(**SMALL_VIT.to_diff_dict()) if kind == "vit" else ConvNextConfig()
    config.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "name", [*OWN, "resnet18", "vit_tiny_patch16_224", "torchvision:mobilenet_v3_small", "folder"]
)
def test_a_model_fits_classes_and_images(name, tmp_path):
    name = folder_of(tmp_path, "vit") if name == "folder" else name
    model = build_model(name, classes="abc", channels=3, image_size=32).eval()
    assert logits_of(model(torch.zeros(2, 3, 32, 32))).shape == (2, 3)


def test_own_files_build_models(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net(num_classes, width=4):\n"
        "    head = nn.Linear(width, num_classes)\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(width), head)"
    )
    model = build_model(f"{file}:net", classes="ab", image_size=8, arguments={"width": 5})
    assert model[2].in_features == 5
    with pytest.raises(ModelError, match="did you mean net"):
        build_model(f"{file}:nett")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet18x", {}, "did you mean resnet18"),
        ("./nowhere", {}, "no folder"),
        ("torchvision:resnet1", {}, "did you mean"),
        ("small-vit", {"pretrained": True}, "leave out --pretrained"),
        ("google/vit-base-patch16-224", {"classes": "ab", "pretrained": True}, "no network"),
        ("resnet18", {"pretrained": True, "classes": "ab"}, "leave out --pretrained"),
    ],
)
def test_what_cannot_be_built_is_said(name, options, said, monkeypatch):
    for variable in ("HF_HUB_OFFLINE",):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=said):
        build_model(name, **options)


def test_a_folder_is_a_folder_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SMALL_VIT.save_pretrained("vit")  # also a model type
    assert build_model("vit", classes="ab").config.hidden_size == 16


def test_weights_of_a_folder_are_loaded_without_a_word(tmp_path, capfd):
    ViTForImageClassification(SMALL_VIT).save_pretrained(tmp_path)
    capfd.readouterr()
    model = build_model(str(tmp_path), classes="abc", channels=3)
    saved = ViTForImageClassification.from_pretrained(tmp_path)
    capfd.readouterr()
    build_model(str(tmp_path), classes="abc", channels=3)
    assert capfd.readouterr() == ("", "")
    name = "vit.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(model.state_dict()[name], saved.state_dict()[name])
    with pytest.raises(ModelError, match="--channels 3"):
        build_model(str(tmp_path), classes="abc", channels=1)


def test_the_narrow_resnet_takes_35_mflop_an_image():
    with FlopCounterMode(display=False) as counter:
        build_model("narrow-resnet18", classes="ab").eval()(torch.zeros(1, 3, 32, 32))
    assert 33e6 < counter.get_total_flops() < 38e6


def test_usual_recipes_are_of_the_models_kind():
    own = RECIPES["own"]
    convolutional = usual_recipe(own, nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    assert (convolutional.optimizer, convolutional.lr) == ("sgd", (0.025,))
    transformer = usual_recipe(own, nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)))
    assert (transformer.optimizer, transformer.lr) == ("adamw", (0.00025,))
    assert usual_recipe(RECIPES["digits"], nn.Linear(2, 2)) == RECIPES["digits"]


def test_rescaled_has_the_direction_of_tract_and_the_ordinary_norm():
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    gradients = {}
    for kind in ("ordinary", "tract", "rescaled"):
        torch.manual_seed(0)
        model = build_model("narrow-resnet18", classes="01234567").train()
        if kind != "ordinary":
            tract_hub.enable(model)
        rescale = Rescaled(model) if kind == "rescaled" else None
        Step(make_accelerator("cpu"), model, before_update=rescale)(images, labels)
        gradients[kind] = model.conv1.weight.grad.flatten()
    scale = gradients["ordinary"].norm() / gradients["tract"].norm()
    assert abs(scale - 1) > 0.01
    torch.testing.assert_close(gradients["rescaled"], gradients["tract"] * scale)
