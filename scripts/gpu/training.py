"""CIFAR-10 on a card: images, crops and flips lie there, and the table is that of ``compare``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from tract_hub.studies import table
from tract_hub.studies.compare import check_identity, finished, prepare
from tract_hub.studies.models import logits_of
from tract_hub.studies.settings import ORDINARY, RECIPES, Arm, Compare, Run
from tract_hub.studies.train import EPOCH_SEED, Experiment, Training, train
from tract_hub.studies.verdict import Study, outcomes, summary

TRACT = Arm(0.1)
LENGTHS = {ORDINARY: (50, 100), TRACT: (25, 50, 100)}
SMOKE_LENGTHS = {ORDINARY: (2, 3), TRACT: (1, 2, 3)}
SEEDS = (0, 1)
TESTED = 1000
"""Test images in a forward."""
SAVED_EVERY = 10
"""Epochs of which a run that is killed loses the last ones; one that ends in time loses none."""


def studies(data: str, out: Path, smoke: bool) -> list[Compare]:
    """Return the settings of the two models: the paper's recipes, in bfloat16 and compiled."""
    if smoke:
        tiny = replace(RECIPES["digits"], max_train=128, max_test=64, seeds=2, epochs=(1, 2, 3))
        vit = replace(
            tiny, model="small-vit", model_arg=("depth=1",), optimizer="adamw", lr=(1e-3,)
        )
        both = {"resnet18": replace(tiny, augment="crop-flip"), "vit": vit}
    else:
        both = {"resnet18": RECIPES["cifar-resnet18"], "vit": RECIPES["cifar-vit"]}
        both = {k: replace(s, data=data, compiled=True, device="cuda") for k, s in both.items()}
    return [
        replace(settings, precision="bf16", channels_last=True, out=out / name)
        for name, settings in both.items()
    ]


def runs(settings: Compare, smoke: bool) -> list[Run]:
    """Return the trainings, shortest first, seeds of one length together."""
    lengths = SMOKE_LENGTHS if smoke else LENGTHS
    keys = sorted(
        (n, seed, arm is TRACT) for arm in lengths for n in lengths[arm] for seed in SEEDS
    )
    return [Run(TRACT if is_tract else ORDINARY, n, settings.lr[0], s) for n, s, is_tract in keys]


class OnCard(Training):
    """A run whose images lie on the device, so that no step waits for the processor."""

    def __init__(self, experiment: Experiment, run: Run) -> None:
        super().__init__(experiment, run)
        device, data = self.accelerator.device, experiment.data
        if data.train.pixels is None or data.test.pixels is None:
            raise SystemExit("the images do not fit in memory")
        on_device = {"pixels": data.train.pixels.to(device), "labels": data.train.labels.to(device)}
        self.images.split = replace(data.train, **on_device)
        self.tested = experiment.to_model(data.test.pixels.to(device)).split(TESTED)
        self.answers = data.test.labels.to(device).split(TESTED)

    def epoch(self, number: int) -> float:
        """Train on all images once: they are cut and normalised together, before the first step."""
        seed = self.run.seed * EPOCH_SEED + number
        set_seed(seed % 2**32)
        shuffled = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        self.images.draw(seed)
        images, labels = self.images.__getitems__(shuffled.tolist())
        size, steps = self.experiment.settings.batch_size, len(self.train)
        batches = self.experiment.to_model(images).split(size)[:steps]
        self.model.train()
        total = torch.zeros((), device=self.accelerator.device)
        for pixels, target in zip(batches, labels.split(size), strict=False):
            total += self.step(pixels, target)
            self.schedule.step()
        return float(total) / steps

    @torch.no_grad()
    def correct(self) -> np.ndarray:
        """Return which test images are right, by an eager forward: a graph of it takes longer."""
        self.model.eval()
        right = []
        for images, labels in zip(self.tested, self.answers, strict=True):
            logits = logits_of(self.model.forward(images))
            right.append((logits.argmax(1) == labels) & logits.isfinite().all(1))
        return torch.cat(right).cpu().numpy()


def train_all(settings: Compare, smoke: bool, end: float) -> bool:
    """Train what is not trained yet; return whether all is."""
    folder = settings.folder()
    wanted = runs(settings, smoke)
    if {run.key for run in wanted} <= finished(folder):
        return True
    experiment = prepare(settings)
    check_identity(folder, experiment)
    for run in wanted:
        if run.key in finished(folder):
            continue
        torch._dynamo.reset()  # or it takes the ninth model for one that changes too often
        if time.monotonic() > end or not train(
            OnCard(experiment, run), folder, OutOfTime(end), SAVED_EVERY
        ):
            return False
    return True


class OutOfTime:
    """Tells after each epoch whether the next one might not end in time."""

    def __init__(self, end: float) -> None:
        self.end, self.began, self.longest, self.epochs = end, time.monotonic(), 0.0, 0

    def __call__(self, row: dict[str, Any]) -> bool:
        now, self.epochs = time.monotonic(), self.epochs + 1
        if self.epochs > 1:  # the first one compiles
            self.longest = max(self.longest, now - self.began)
        self.began = now
        if row["epoch"] == row["epochs"]:
            name = f"{row['study']}, {row['arm']}, {row['epochs']} epochs, seed {row['seed']}"
            accuracy = f"{row['accuracy']:.2%}"
            print(f"{name}: {accuracy}, {row['seconds']:.2f} s for the last epoch", flush=True)
        return now + 2 * self.longest > self.end


def tables(settings: Compare, smoke: bool) -> Iterator[str]:
    """Yield the verdict's sentences and its table, by the definitions of ``tract-hub compare``."""
    folder = settings.folder()
    rows = table.read(folder / "runs.jsonl")
    if rows.empty:
        return
    facts = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    labels = table.unpack_labels(facts["test_labels"])
    lengths = SMOKE_LENGTHS if smoke else LENGTHS
    every = {n: settings.lr[0] for ns in lengths.values() for n in ns}
    study = Study(facts["metric"], labels, every)
    found = outcomes(rows, study, [(TRACT.name, n) for n in sorted(lengths[TRACT], reverse=True)])
    yield f"## {facts['study']}\n\n"
    last = rows[rows["epoch"] == rows["epochs"]]
    ends = last.groupby(["arm", "epochs"]).agg(
        seeds=("seed", "count"), accuracy=(facts["metric"], "mean"), seconds=("seconds", "mean")
    )
    ends["accuracy"] = (100 * ends["accuracy"]).map("{:.2f} %".format)
    ends["seconds"] = ends["seconds"].map("{:.2f} an epoch".format)
    yield table.markdown(ends.reset_index()) + "\n"
    yield "".join(f"{one.sentence}\n\n" for one in found)
    if found:
        yield table.markdown(summary(found)) + "\n"
