"""What compare varies beside TrAct: classes, first weights, pixels, the stem's optimizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tract_hub
from tests.studies.comparisons import ONE_SEED, TINY, compare, tiny_study
from tract_hub.errors import SettingsError, TractWarning
from tract_hub.studies.compare.facts import facts_of
from tract_hub.studies.compare.optim import make_optimizer
from tract_hub.studies.compare.recipes import build_settings
from tract_hub.studies.images.augment import CropFlip
from tract_hub.studies.images.sources import load_source


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_model_is_fine_tuned_on_other_classes_from_the_weights_of_a_run() -> None:
    alone = ["--lam", "none", *ONE_SEED, *TINY, "--out", "before", "--classes", "0-4"]
    assert compare(*alone, "--save-weights") == 0
    before = results(Path("before"))
    assert [run["name"] for run in before["runs"]] == ["ordinary"]
    assert before["identity"]["data"]["classes"] == list("01234")
    weights = Path("before", "runs", "ordinary-seed0.safetensors")
    assert load_file(weights)["head.weight"].shape == (5, 16)

    tune = [*ONE_SEED, *TINY, "--classes", "5,7,9", "--weights", str(weights)]
    assert compare(*tune, "--out", "after") == 0
    after = results(Path("after"))
    assert after["identity"]["data"]["classes"] == list("579")
    assert "--classes 5,7,9" in after["command"]
    assert "--weights ordinary-seed0.safetensors" in after["command"]
    tuned = tiny_study(classes=(5, 7, 9), weights=str(weights)).plan
    model = tuned.build()
    assert torch.equal(model.patch_embed.proj.weight, load_file(weights)["patch_embed.proj.weight"])
    assert tuned.remarks[0].endswith("but for head.bias, head.weight")

    # A run whose weights are missing where they are asked for is made again.
    weights.unlink()
    assert compare(*alone, "--save-weights") == 0
    assert weights.is_file()


def test_classes_are_numbered_anew() -> None:
    whole, part = load_source("digits"), load_source("digits", classes=(3, 8))
    wanted = whole.train.labels[torch.isin(whole.train.labels, torch.tensor([3, 8]))]
    assert torch.equal(part.train.labels, (wanted == 8).long())
    first = int((whole.train.labels == 3).nonzero()[0])
    place = int((part.train.labels == 0).nonzero()[0])
    assert torch.equal(part.train.read(place), whole.train.read(first))


@pytest.mark.parametrize(("name", "low", "high"), [("unit", 0, 1), ("bytes", 0, 255)])
def test_pixels_can_be_left_unstandardised(name: str, low: int, high: int) -> None:
    made = tiny_study(normalise=name)
    images, _ = made.data.train.batch(list(range(64)))
    values = made.normalised(images)
    assert values.dtype == torch.float32
    assert (values.min(), values.max()) == (low, high)
    torch.testing.assert_close(values, images * (high / 255))


def test_channels_last_reaches_model_and_images() -> None:
    made = tiny_study(channels_last=True, channels=3)
    images, _ = made.data.train.batch([0, 1])
    assert made.normalised(images).is_contiguous(memory_format=torch.channels_last)


def test_the_first_layer_can_have_sgd_and_a_rate_of_its_own() -> None:
    made = tiny_study(stem_optimizer="sgd", stem_lr=0.5, optimizer="adam", momentum=0.0)
    model = made.plan.build()
    optimizer = make_optimizer(model, made.settings, made.stems)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    moved = {name: before[name] - value.detach() for name, value in model.named_parameters()}
    stem = "patch_embed.proj.weight"
    assert [found.weight_name for found in made.stems] == [stem]
    torch.testing.assert_close(moved[stem], torch.full_like(moved[stem], 0.05))
    rest = torch.cat([value.flatten() for name, value in moved.items() if name != stem])
    torch.testing.assert_close(rest, torch.full_like(rest, made.settings.lr))  # Adam's first step


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "adam, lr 0.003 cosine, weight decay"),
        ({"optimizer": "SGD", "momentum": 0.5}, "SGD, lr 0.003 cosine, momentum 0.5, weight"),
        ({"optimizer": "nlars"}, "nlars, lr 0.003 cosine, momentum 0.9, weight decay"),
        ({"stem_optimizer": "sgd"}, "first layer: SGD, momentum 0.9, lr 0.003"),
    ],
)
def test_what_was_compared_names_the_momentum_wherever_there_is_one(
    changes: dict[str, object], shown: str
) -> None:
    assert shown in dict(facts_of(tiny_study(**changes)))["optimizer"]


def test_what_was_compared_names_every_first_layer() -> None:
    made = tiny_study(model="repvgg_a0", model_args=(), image_size=32, channels=3, epochs=1)
    facts = dict(facts_of(made))
    assert len(made.stems) == 2
    assert all(stem.weight_name in facts["stem found"] for stem in made.stems)
    assert facts["training"] == "1 epoch, batches of 32"
    assert ", 1 process, " in facts["device"]


def test_an_optimizer_that_refuses_its_settings_is_named() -> None:
    settings = build_settings("digits-vit", {"optimizer": "nlars", "momentum": 0.0})
    with pytest.raises(
        SettingsError, match=r"nlars cannot be made \(Nesterov momentum.* another --opt"
    ):
        make_optimizer(nn.Linear(2, 2), settings)


def test_an_image_is_cut_from_its_padded_self_and_every_second_is_flipped() -> None:
    images = torch.arange(1, 201 * 64 + 1).reshape(-1, 1, 8, 8)[:200]
    cut = CropFlip(200, 8, seed=0)
    flips = []
    for i, image in enumerate(cut(images, list(range(200)))):
        padded = torch.nn.functional.pad(images[i], [1] * 4)
        windows = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        straight = sum(torch.equal(window, image) for window in windows)
        flipped = sum(torch.equal(window.flip(2), image) for window in windows)
        assert straight + flipped == 1
        flips.append(flipped)
    assert 70 < sum(flips) < 130
    assert torch.equal(cut(images[5:9], [5, 6, 7, 8]), cut(images, list(range(200)))[5:9])


def test_tract_and_patch_norm_can_be_had_together() -> None:
    made = tiny_study(patch_norm="dual")
    with pytest.warns(TractWarning, match=r"the pixels pass patch_embed\.proj\.norm"):
        model = tract_hub.enable(made.plan.build(), example_inputs=made.plan.example())
    assert [s.weight_name for s in tract_hub.status(model)] == ["patch_embed.proj.conv.weight"]
