"""Real scripts as real processes: launched, their first layer moves by the closed form."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import closed_form, layer_rows, relative_error

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = SCRIPTS.parents[2]
PYTHON = [sys.executable]
BIN = Path(sys.executable).parent
LAUNCH = ["-m", "tract_hub.launch", "--lam", "0.2"]
ACCELERATE = [*PYTHON, "-m", "accelerate.commands.launch"]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own, in a neutral folder."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    return subprocess.run(
        words, env=environment, cwd="/", capture_output=True, text=True, timeout=120
    )


def our_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("tract_hub.launch: ")]


def ordinary(
    monkeypatch: pytest.MonkeyPatch, script: str, out: Path, *arguments: object
) -> dict[str, Any]:
    """Run the same script here, as it is."""
    monkeypatch.setattr(sys, "argv", [script, *(str(argument) for argument in arguments)])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    return torch.load(out)


def moved(saved: dict[str, Any]) -> dict[str, Tensor]:
    return {name: saved["after"][name] - value for name, value in saved["before"].items()}


def expected_move(saved: dict[str, Any], stem: str, layer: torch.nn.Module, lam: float) -> Tensor:
    with torch.no_grad():
        layer.weight.copy_(saved["before"][stem])
    return closed_form(moved(saved)[stem], layer_rows(layer, saved["images"]), lam)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig

    folder = tmp_path_factory.mktemp("vit")
    ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=4,
        num_labels=4,
        hidden_dropout_prob=0.0,
    ).save_pretrained(folder)
    return folder


def hf_trainer(out: Path, config: Path) -> list[object]:
    options = "--max_steps 1 --learning_rate 0.1 --lr_scheduler_type constant --optim sgd"
    options += " --max_grad_norm 0 --per_device_train_batch_size 4 --use_cpu --report_to none"
    options += " --save_strategy no --disable_tqdm true"
    names = ["--config_name", config, "--out", out, "--output_dir", out.parent]
    return [*names, *options.split()]


HF_STEM = "vit.embeddings.patch_embeddings.projection.weight"
CASES: dict[str, tuple[list[str], str, Any, str, Any]] = {
    "timm": (
        [*PYTHON, *LAUNCH],
        "timm_loop.py",
        lambda out, config: [out, "--grad-accum-steps", "2"],
        "patch_embed.proj.weight",
        lambda: torch.nn.Conv2d(3, 64, 16, stride=16),
    ),
    "Trainer": (
        [*ACCELERATE, "--cpu", *LAUNCH],
        "hf_trainer.py",
        hf_trainer,
        HF_STEM,
        lambda: torch.nn.Conv2d(3, 16, 4, stride=4),
    ),
    "Accelerate": (
        [*ACCELERATE, "--cpu", *LAUNCH],
        "accelerate_loop.py",
        lambda out, config: [out, "--config", config],
        HF_STEM,
        lambda: torch.nn.Conv2d(3, 16, 4, stride=4),
    ),
    "distillation, tract-hub": (
        [*PYTHON, "-m", "tract_hub", "launch", "--lam", "0.2"],
        "distillation.py",
        lambda out, config: [out],
        "features.0.weight",
        lambda: torch.nn.Conv2d(3, 96, 7, stride=2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_launched_script_makes_the_step_of_the_closed_form(case, config, tmp_path, monkeypatch):
    command, script, arguments, stem, layer = CASES[case]
    out = tmp_path / "weights.pt"
    launched = run(*command, SCRIPTS / script, *arguments(out, config))
    assert launched.returncode == 0, launched.stderr
    (line,) = our_lines(launched.stderr)
    assert f"λ=0.2 on {stem} of" in line and "1 of 1 optimizer steps used it" in line
    got = torch.load(out)
    plain = ordinary(monkeypatch, script, out, *arguments(out, config))
    expected = {**moved(plain), stem: expected_move(plain, stem, layer(), 0.2)}
    assert relative_error(moved(plain)[stem], expected[stem]) > 0.1
    for name, change in moved(got).items():
        assert relative_error(change, expected[name]) < 1e-4, name


@pytest.mark.parametrize("wrapped", ["DDP", "FSDP2"])
def test_torchrun_trains_every_rank_and_prints_one_line(wrapped, tmp_path, monkeypatch):
    out = tmp_path / "weights.pt"
    options = ["--shard"] if wrapped == "FSDP2" else []
    launched = run(*TORCHRUN, *LAUNCH, SCRIPTS / "torchvision_loop.py", out, *options)
    assert launched.returncode == 0, launched.stderr
    (line,) = our_lines(launched.stderr)
    assert "λ=0.2 on features.0.weight of" in line and "1 of 1" in line
    got = moved(torch.load(out))
    stem, layer = "features.0.weight", torch.nn.Conv2d(3, 96, 7, stride=2)
    moves = []
    for seed in (0, 1):
        plain = ordinary(monkeypatch, "torchvision_loop.py", out, out, "--seed", seed)
        moves.append(expected_move(plain, stem, layer, 0.2))
    assert relative_error(got[stem], (moves[0] + moves[1]) / 2) < 1e-4


def test_every_rank_of_torchrun_fails_where_nothing_was_enabled():
    launched = run(*TORCHRUN, *LAUNCH, SCRIPTS / "small.py", "nothing_at_all")
    assert launched.returncode != 0
    assert len(our_lines(launched.stderr)) == 1
    assert "exitcode  : 3" in launched.stderr


def test_a_compiled_model_with_amp_accumulation_and_ema_is_trained_alike(tmp_path, monkeypatch):
    out = tmp_path / "weights.pt"
    options = [out, "--amp", "--grad-accum-steps", "2"]
    launched = run(*PYTHON, *LAUNCH, SCRIPTS / "timm_loop.py", *options, "--compile")
    assert launched.returncode == 0, launched.stderr
    assert "patch_embed.proj.weight of model" in our_lines(launched.stderr)[0]
    stem, layer = "patch_embed.proj.weight", torch.nn.Conv2d(3, 64, 16, stride=16)
    got = moved(torch.load(out))[stem]
    plain = ordinary(monkeypatch, "timm_loop.py", out, *options)
    assert relative_error(got, expected_move(plain, stem, layer, 0.2)) < 2e-2  # bfloat16


def test_a_launched_process_ends_as_the_script_does():
    raised = run(*PYTHON, *LAUNCH, SCRIPTS / "small.py", "raises")
    assert raised.returncode == 1 and "the disk is full" in raised.stderr
    assert "1 of 1 optimizer steps used it" in our_lines(raised.stderr)[0]


def test_scope_global_makes_two_processes_one(tmp_path: Path) -> None:
    weights = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        launcher = [*TORCHRUN[:-1], processes, "-m", "tract_hub.launch", "--scope", "global"]
        done = run(*launcher, SCRIPTS / "whole_batch.py", out)
        assert done.returncode == 0, done.stderr
        (line,) = our_lines(done.stderr)
        assert "λ=0.1, scope global, on 0.weight" in line
        assert "3 of 3 optimizer steps used it" in line
        weights.append(torch.load(out))
    for name, weight in weights[0].items():
        assert relative_error(weights[1][name], weight) <= 1e-12, name
