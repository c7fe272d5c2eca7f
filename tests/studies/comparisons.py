"""Comparisons that take a second, their results, and records as they leave them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tract_hub.cli import main
from tract_hub.studies.compare.recipes import build_settings
from tract_hub.studies.compare.records import Arm, EpochRecord, Filters, RunRecord
from tract_hub.studies.compare.study import Study, make_study

TRACT = Arm(0.1)
ONE_SEED = ["--seeds", "0"]
TWO_SEEDS = ["--seeds", "0,1"]
# One block of width 16 on 8-pixel digits: an epoch takes a fraction of a second.
TINY = (
    "--image-size 8 --model-arg patch_size=4 --model-arg embed_dim=16 --model-arg depth=1 "
    "--model-arg num_heads=2 --epochs 2 --batch-size 32 --max-train 128 --max-test 64 "
    "--device cpu"
).split()
TINY_ARGUMENTS = (("depth", 1), ("embed_dim", 16), ("num_heads", 2), ("patch_size", 4))


def tiny_study(**changes: object) -> Study:
    """What the options ``TINY`` ask for."""
    given = {
        "image_size": 8, "model_args": TINY_ARGUMENTS, "epochs": 2, "batch_size": 32,
        "max_train": 128, "max_test": 64, "device": "cpu",
    }  # fmt: skip
    return make_study(build_settings("digits-vit", {**given, **changes}))


def compare(*arguments: str) -> int:
    """Return the exit status of ``tract-hub compare``."""
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    return stop.value.code


def numbers(folder: Path) -> list[dict[str, str]]:
    """Return every number of results.csv, to the last digit, but the times, which vary."""
    rows = list(csv.DictReader((folder / "results.csv").open()))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def record(arm: Arm, seed: int, accuracies: list[float], **changes: object) -> RunRecord:
    """A run with these accuracies, epoch by epoch."""
    epochs = tuple(EpochRecord(i, 1.0, 1.0, a, 1.0) for i, a in enumerate(accuracies, 1))
    given = {"diverged_at": None, "start": f"s{seed}", "batches": f"b{seed}", **changes}
    return RunRecord(
        arm, seed, epochs, filters=Filters("w", (0,), (0, 1), [[[0.0]], [[0.0]]]), **given
    )
