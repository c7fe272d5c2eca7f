from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from rich.console import Console

import tract_hub
from tests.studies.comparisons import (
    ONE_SEED,
    TINY,
    TINY_ARGUMENTS,
    TRACT,
    TWO_SEEDS,
    compare,
    numbers,
    tiny_study,
)
from tract_hub.studies.compare import run as compare_module
from tract_hub.studies.compare.progress import Progress
from tract_hub.studies.compare.recipes import build_settings
from tract_hub.studies.compare.records import ORDINARY
from tract_hub.studies.compare.study import make_study
from tract_hub.studies.compare.training import extend_digest, fresh_model, state_digest, train_run
from tract_hub.studies.images.sources import load_source
from tract_hub.studies.models.plan import plan_model


def table(folder: Path) -> list[str]:
    """Return the lines of table.md without the times."""
    lines = (folder / "table.md").read_text().splitlines()
    return [line for line in lines if not line.startswith("| step time")]


def test_arms_of_a_seed_start_from_the_same_bits_and_seeds_from_others():
    study = tiny_study()
    digests = {
        (arm, seed): state_digest(fresh_model(study, arm, seed))
        for arm in (ORDINARY, TRACT)
        for seed in (0, 1)
    }
    assert digests[ORDINARY, 0] == digests[TRACT, 0]
    assert digests[ORDINARY, 1] == digests[TRACT, 1]
    assert digests[ORDINARY, 0] != digests[ORDINARY, 1]


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_arms_see_the_same_batches_and_dropout_but_train_differently(augment):
    study = tiny_study(augment=augment, model_args=(*TINY_ARGUMENTS, ("drop_rate", 0.5)))
    ordinary = train_run(study, ORDINARY, 0, Progress())
    torch.rand(3)
    again = train_run(study, ORDINARY, 0, Progress())
    tract = train_run(study, TRACT, 0, Progress())
    assert ordinary.batches == again.batches == tract.batches
    assert [e.train_loss for e in ordinary.epochs] == [e.train_loss for e in again.epochs]
    assert ordinary.filters == again.filters
    assert ordinary.filters != tract.filters
    assert ordinary.batches != train_run(study, ORDINARY, 1, Progress()).batches


def test_the_tract_arm_gets_the_tract_gradient_and_the_ordinary_arm_does_not(monkeypatch):
    asked = []
    enable = tract_hub.enable
    monkeypatch.setattr(
        tract_hub, "enable", lambda model, **k: asked.append(k["lam"]) or enable(model, **k)
    )
    study = tiny_study(lams=(0.05, 0.2))
    for arm in study.arms:
        fresh_model(study, arm, 0)
    assert asked == [0.05, 0.2]


def test_the_digest_of_batches_tells_orders_apart():
    images = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    labels = torch.tensor([0, 1])
    zero = torch.zeros((), dtype=torch.int64)

    def digest(*batches):
        seen = zero
        for batch in batches:
            seen = extend_digest(seen, *batch)
        return seen.item()

    first, second = (images, labels), (images + 1, labels)
    different = [
        digest(first, second),
        digest(second, first),
        digest((images.flip(0), labels.flip(0)), second),
        digest((images, labels.flip(0)), second),
        digest(first),
    ]
    assert len(set(different)) == len(different)


def test_results_are_complete_and_hold_no_path(tmp_path, capsys):
    out = tmp_path / "results"
    assert compare(*TINY, *TWO_SEEDS, "--lam", "0.1,0.3", "--out", str(out)) == 0
    assert "What TrAct gained" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(results["runs"]) == 3 * 2
    assert len(rows) == 3 * 2 * 2
    assert {row["arm"] for row in rows} == {"ordinary", "TrAct λ=0.1", "TrAct λ=0.3"}
    first = results["runs"][0]["epochs"][0]
    assert float(rows[0]["accuracy"]) == first["accuracy"]
    assert set(first) == {"epoch", "train_loss", "test_loss", "accuracy", "seconds"}
    assert results["timing"]["overhead"]["ordinary"] == 1.0
    assert "patch_embed.proj.weight" in results["stem"]
    with Image.open(out / "compare.png") as picture:
        assert min(picture.size) > 500
    for file in out.rglob("*.*"):
        assert str(tmp_path).encode() not in file.read_bytes(), file
    assert not list(out.rglob("*.part"))


def test_the_command_in_the_results_makes_the_same_comparison(tmp_path):
    from tract_hub.studies.compare.identity import command_of

    given = {
        "seeds": (3, 1), "lams": (0.1, 0.25), "lr": 0.00123456789, "epochs": 3, "stem": "cifar",
        "image_size": 24, "channels": 3, "augment": "crop-flip", "max_train": 100, "max_test": 99,
        "optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.1, "schedule": "linear",
        "warmup_epochs": 0.5, "label_smoothing": 0.1, "batch_size": 7, "device": "cpu",
        "precision": "bf16", "model": "resnet18", "model_args": (("block_args", None),),
    }  # fmt: skip
    settings = build_settings("digits-vit", given)
    import shlex

    from tract_hub.commands import compare as command

    seen = []
    original = command._run
    command._run = lambda recipe, values, report: seen.append(build_settings(recipe, values))
    try:
        assert compare(*shlex.split(command_of(settings))[2:]) == 0
    finally:
        command._run = original
    assert seen == [settings]


def test_an_interrupted_comparison_goes_on_and_gives_the_same_table(tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert compare(*TINY, *TWO_SEEDS, "--out", str(whole)) == 0
    trained = []
    original = compare_module.train_run

    def interrupted(study, arm, seed, *others):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((arm, seed))
        return original(study, arm, seed, *others)

    monkeypatch.setattr(compare_module, "train_run", interrupted)
    capsys.readouterr()
    assert compare(*TINY, *TWO_SEEDS, "--out", str(parts)) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (parts / "results.json").exists()
    assert len(list((parts / "runs").glob("*.json"))) == 3

    monkeypatch.setattr(compare_module, "train_run", original)
    again = []
    monkeypatch.setattr(
        compare_module,
        "train_run",
        lambda study, *run: again.append(run[:2]) or original(study, *run),
    )
    assert compare(*TINY, *TWO_SEEDS, "--out", str(parts)) == 0
    assert "resuming: 3 of 4" in capsys.readouterr().out
    assert len(again) == 1
    assert not set(again) & set(trained)
    assert numbers(parts) == numbers(whole)
    assert table(parts) == table(whole)
    # Once all is done, nothing is trained any more.
    assert compare(*TINY, *TWO_SEEDS, "--out", str(parts)) == 0
    assert len(again) == 1


def test_kill_9_in_the_middle_of_a_run_costs_that_run_alone(tmp_path, tract_hub_process, capsys):
    out = tmp_path / "killed"
    long = ["--epochs", "60", *ONE_SEED]
    process = tract_hub_process("compare", *TINY, *long, "--out", str(out))
    first = out / "runs" / "ordinary-seed0.json"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert [p.name for p in (out / "runs").iterdir()] == [first.name]
    assert not (out / "results.json").exists()
    before = first.read_bytes()
    assert compare(*TINY, *long, "--out", str(out)) == 0
    assert "resuming: 1 of 2" in capsys.readouterr().out
    assert first.read_bytes() == before
    assert (out / "results.json").exists()


def test_half_a_file_is_no_finished_run(tmp_path):
    out = tmp_path / "out"
    assert compare(*TINY, *ONE_SEED, "--out", str(out)) == 0
    run = out / "runs" / "tract-0.1-seed0.json"
    whole = run.read_text()
    run.write_text(whole[: len(whole) // 2])
    assert compare(*TINY, *ONE_SEED, "--out", str(out)) == 0
    assert json.loads(run.read_text())["start"] == json.loads(whole)["start"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("--lr 0.01", "(settings.lr 0.003 there, 0.01 now)"),
        ("--epochs 3", "(settings.epochs 2 there, 3 now)"),
        ("--precision bf16", "(settings.precision fp32 there, bf16 now)"),
        ("--max-train 96", "(settings.max_train 128 there, 96 now; "),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, capsys, change, difference):
    out = tmp_path / "out"
    out.mkdir()
    identity = compare_module._store(tiny_study(out=out)).identity
    (out / "identity.json").write_text(json.dumps(identity))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert compare(*TINY, *change.split(), "--out", str(out)) == 2
    line = capsys.readouterr().err
    assert "holds runs made with other settings" in line
    assert difference in line
    assert "pass another --out" in line


def test_more_seeds_and_arms_reuse_the_runs_that_are_there(tmp_path, monkeypatch):
    out = tmp_path / "out"
    made = []
    original = compare_module.train_run
    monkeypatch.setattr(
        compare_module,
        "train_run",
        lambda study, *run: made.append((str(run[0]), run[1])) or original(study, *run),
    )
    assert compare(*TINY, *ONE_SEED, "--out", str(out)) == 0
    made.clear()
    assert compare(*TINY, "--seeds", "0,4", "--lam", "0.1,0.2", "--out", str(out)) == 0
    assert sorted(made) == [
        ("TrAct λ=0.1", 4),
        ("TrAct λ=0.2", 0),
        ("TrAct λ=0.2", 4),
        ("ordinary", 4),
    ]


def test_without_out_a_folder_is_named_after_the_settings():
    for lr in ("0.001", "0.002"):
        assert compare(*TINY, *ONE_SEED, "--epochs", "1", "--lr", lr) == 0
    assert len(list(Path("tract-hub-runs").glob("compare-*/results.json"))) == 2


def test_divergence_is_reported_and_is_no_error(tmp_path, capsys):
    out = tmp_path / "out"
    diverging = ("--optimizer", "sgd", "--lr", "1e30", "--schedule", "constant")
    assert compare(*TINY, *TWO_SEEDS, *diverging, "--out", str(out)) == 0
    shown = capsys.readouterr()
    assert "diverged at epoch 1" in (out / "table.md").read_text()
    assert "diverged at epoch 1" in shown.err
    results = json.loads((out / "results.json").read_text())
    assert results["target_accuracy"] is None
    assert all(run["diverged_at"] == 1 and len(run["epochs"]) == 1 for run in results["runs"])
    assert (out / "compare.png").exists()


def test_the_cifar_recipe_adapts_the_stem_and_says_so(image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    folder = str(image_folder("cat dog", count=10, size=(32, 32)))
    small = "--epochs 1 --seeds 0 --batch-size 8 --device cpu --max-test 2".split()
    assert compare("--recipe", "cifar-resnet", "--data", folder, *small, "--out", str(out)) == 0
    said = "stem conv1 adapted: 7 × 7 stride 2 → 3 × 3 stride 1"
    assert said in capsys.readouterr().out
    assert said in (out / "table.md").read_text()
    filters = json.loads((out / "runs" / "ordinary-seed0.json").read_text())["filters"]["values"]
    assert torch.tensor(filters).shape == (2, 16, 3, 3, 3)


@pytest.mark.parametrize("weights", [False, True])
def test_a_hugging_face_folder_trains_from_its_weights_where_it_has_them(
    tmp_path, image_folder, weights
):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=4,
    )  # fmt: skip
    folder = tmp_path / "model"
    saved = ViTForImageClassification(config)
    saved.save_pretrained(folder) if weights else config.save_pretrained(folder)
    given = {"model": str(folder), "data": str(image_folder()), "device": "cpu", "batch_size": 8}
    study = make_study(build_settings("digits-vit", given))
    model, name = fresh_model(study, TRACT, 0), study.stems[0].weight_name
    same = torch.equal(model.get_parameter(name), saved.get_parameter(name))
    assert same == weights
    assert model.config.num_labels == 2
    # Weights keep the size that they were trained for; a config alone takes the images'.
    assert study.plan.size == (16 if weights else 12)
    assert study.plan.name == "model"


def test_images_are_resized_only_for_a_model_that_cannot_take_them():
    changes = {"model": "resnet18", "max_train": 64}
    settings = build_settings("digits-vit", changes)
    assert plan_model(settings, load_source("digits")).size == 8
    settings = build_settings("digits-vit", {"model": "vit_wee_patch16_reg1_gap_256"})
    assert plan_model(settings, load_source("digits")).size == 256


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(terminal):
    import io

    from tract_hub.studies.compare.progress import make_progress
    from tract_hub.studies.compare.records import EpochRecord

    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with make_progress(console, 1, 2, True) as progress:
        progress.run_began("ordinary, seed 0")
        progress.step_ended()
        progress.epoch_ended(EpochRecord(1, 1.0, 1.0, 0.5, 1.0))
        progress.run_ended(1)
    shown = console.file.getvalue()
    assert "ordinary, seed 0" in shown
    assert "epoch 1, accuracy 50.0%" in shown
    assert ("2/2" in shown) == terminal
