"""CIFAR-10 on a card: images, crops and flips lie there, and the table is that of ``compare``."""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tract_hub.studies import table
from tract_hub.studies.compare import check_identity, finished, prepare
from tract_hub.studies.data import Batch
from tract_hub.studies.settings import ORDINARY, RECIPES, Arm, Compare, Run
from tract_hub.studies.train import Experiment, Training, train
from tract_hub.studies.verdict import Study, outcomes, summary

TRACT = Arm(0.1)
LENGTHS = {ORDINARY: (50, 100), TRACT: (25, 50, 100)}
SMOKE_LENGTHS = {ORDINARY: (2, 3), TRACT: (1, 2, 3)}
SAVED_EVERY = 10  # epochs: what a killed run loses; one that stops in time loses none


def studies(data: str, out: Path, smoke: bool) -> list[Compare]:
    """Return the settings of the two models: the paper's recipes, in bfloat16 and compiled."""
    both = [RECIPES["cifar-resnet18"], RECIPES["cifar-vit"]]
    if smoke:
        both = [RECIPES["narrow-resnet18"], replace(RECIPES["small-vit"], model_arg=("depth=1",))]
        both = [replace(s, data="digits", max_train=128, max_test=64) for s in both]
    same = {"precision": "bf16", "channels_last": True, "compiled": not smoke}
    same |= {"device": "cpu"} if smoke else {"device": "cuda", "data": data}
    return [replace(settings, **same, out=out / settings.recipe) for settings in both]


def runs(settings: Compare, smoke: bool) -> list[Run]:
    """Return the trainings, shortest first, seeds of one length together."""
    arms = [(a, n) for a, ns in (SMOKE_LENGTHS if smoke else LENGTHS).items() for n in ns]
    every = [Run(arm, n, settings.lr[0], seed) for arm, n in arms for seed in (0, 1)]
    return sorted(every, key=lambda run: (run.epochs, run.seed))


class OnCard(Training):
    """A run whose images lie on the device, so that no step waits for the processor."""

    def __init__(self, experiment: Experiment, run: Run) -> None:
        super().__init__(experiment, run)
        device = self.accelerator.device
        train, test = (
            replace(split, pixels=split.pixels.to(device), labels=split.labels.to(device))
            for split in (experiment.data.train, experiment.data.test)
        )
        self.images.split = train
        self.test = list(zip(test.pixels.split(1000), test.labels.split(1000), strict=True))

    def batches(self) -> Iterator[Batch]:
        """Yield an epoch's batches: all are cut and normalised together, before the first step."""
        shuffled = torch.randperm(len(self.images), generator=self.generator)
        images, labels = self.images.__getitems__(shuffled.tolist())
        size = self.experiment.settings.batch_size
        batches = zip(self.experiment.to_model(images).split(size), labels.split(size), strict=True)
        return itertools.islice(batches, len(self.train))

    def correct(self) -> np.ndarray:
        """Return which test images are right, by an eager forward: a graph of it takes longer."""
        with torch.compiler.set_stance("force_eager"):
            return super().correct()


def train_all(settings: Compare, smoke: bool, end: float) -> bool:
    """Train what is not trained yet; return whether all is."""
    folder = settings.out
    left = [run for run in runs(settings, smoke) if run.key not in finished(folder)]
    if not left or time.monotonic() > end:
        return not left
    experiment = prepare(settings)
    check_identity(folder, experiment)
    return all(time.monotonic() < end and train_one(experiment, run, end) for run in left)


def train_one(experiment: Experiment, run: Run, end: float) -> bool:
    """Train a run from where it stopped; return whether it is done, which it is not out of time."""
    torch.compiler.reset()  # or it takes the ninth model for one that changes too often

    def after(row: dict[str, Any]) -> bool:
        if row["epoch"] == row["epochs"]:
            print(f"{experiment.study}, {run.slug}: {row['accuracy']:.2%}", flush=True)
        return time.monotonic() + 2 * row["seconds"] > end

    return train(OnCard(experiment, run), experiment.settings.out, after, SAVED_EVERY)


def tables(settings: Compare, smoke: bool) -> Iterator[str]:
    """Yield the verdict's sentences and its table, by the definitions of ``tract-hub compare``."""
    rows, folder = table.read(settings.out / "runs.jsonl"), settings.out
    if rows.empty:
        return
    facts = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    lengths = (SMOKE_LENGTHS if smoke else LENGTHS)[TRACT]  # ordinary training's are among them
    rates = dict.fromkeys(lengths, settings.lr[0])
    study = Study(facts["metric"], table.unpack(facts["test_labels"]), rates)
    found = outcomes(rows, study, [(TRACT.name, n) for n in reversed(lengths)])
    yield f"## {facts['study']}\n\n"
    yield "".join(f"{one.sentence}\n\n" for one in found)
    if found:
        yield table.markdown(summary(found)) + "\n"
