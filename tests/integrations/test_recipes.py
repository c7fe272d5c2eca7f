"""Each recipe, and each accelerate config, in a smoke run on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
# accelerate leaves FSDP out on a CPU and trains with DDP: its config is only read here.
RUNS = {
    "deit3-small": ("one-gpu.yaml",),
    "resnet50": ("one-gpu.yaml", "--num_processes", "1"),
    "cifar100-cnn": ("eight-gpus.yaml", "--num_processes", "2"),
    "deit3-base": ("fsdp.yaml", "--num_processes", "2"),
    "finetune": ("nodes.yaml", "--num_processes", "2", "--num_machines", "1"),
}


def train(recipe: str, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    config, *others = RUNS[recipe]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*accelerate, "--config_file", str(RECIPES / "accelerate" / config), *others]
    script = [str(RECIPES / "train.py"), recipe, "--out", str(out), "--workers", "0", *options]
    path = os.pathsep.join([str(RECIPES.parents[1]), os.environ.get("PYTHONPATH", "")])
    cpu = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*command, *script], env={**os.environ, **cpu}, capture_output=True, text=True, timeout=120
    )


def test_every_recipe_and_every_config_has_a_run() -> None:
    assert {path.stem for path in (RECIPES / "settings").iterdir()} == set(RUNS)
    assert {path.name for path in (RECIPES / "accelerate").iterdir()} == {
        r[0] for r in RUNS.values()
    }


@pytest.mark.parametrize("recipe", RUNS)
def test_a_smoke_run_trains_and_saves(recipe: str, tmp_path: Path) -> None:
    done = train(recipe, tmp_path, "--smoke")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    epoch = json.loads(line)
    assert epoch["epoch"] == 0 and 0 < epoch["loss"] < 10 and 0 <= epoch["top1"] <= 1
    assert (tmp_path / "model.safetensors").is_file()


def test_tract_changes_what_is_trained_and_a_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    weights = {}
    for name, options in {"tract": (), "ordinary": ("--ordinary",)}.items():
        done = train("resnet50", tmp_path / name, "--smoke", *options)
        assert done.returncode == 0, done.stderr
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    stem = "conv1.0.weight"
    assert not torch.equal(weights["tract"][stem], weights["ordinary"][stem])
    again = train("resnet50", tmp_path / "tract", "--smoke", "--resume")
    assert again.returncode == 0, again.stderr
    assert "epoch" not in again.stdout  # the only one was done
    history = json.loads((tmp_path / "tract" / "history.json").read_text())
    assert [epoch["epoch"] for epoch in history["epochs"]] == [0]
    other = train("resnet50", tmp_path / "tract", "--smoke", "--resume", "lam=0.2")
    assert other.returncode != 0
    assert "was trained with other settings" in other.stderr


def test_a_budget_shortens_whatever_is_counted_in_epochs(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    from recipe import load_recipe

    whole, tenth = (load_recipe("cifar100-cnn", [], False, budget) for budget in (1.0, 0.1))
    assert (whole.epochs, tenth.epochs) == (200, 20)
    assert tenth.schedule["decay_milestones"] == pytest.approx([6, 12, 16])
    assert tenth.schedule["decay_rate"] == whole.schedule["decay_rate"]


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    done = train("cifar100-cnn", tmp_path, "--smoke", "batch_size=3")
    assert done.returncode != 0
    assert "batch_size 3 cannot be shared by 2 processes" in done.stderr


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("resnet5", [], "there is no recipe resnet5: there is cifar100-cnn, deit3-base"),
        ("resnet50", ["lamm=1"], "a recipe has no lamm"),
    ],
)
def test_what_is_no_recipe_is_refused(name, changes, says, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    from recipe import load_recipe

    assert load_recipe("resnet50", ["optimizer.lr=0.141"], False).optimizer["lr"] == 0.141
    with pytest.raises(SystemExit, match=says):
        load_recipe(name, changes, False)
