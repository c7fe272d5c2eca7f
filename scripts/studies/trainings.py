"""Train a part by a command that anybody can type, and read what it left behind."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from study import Part, Study

from tract_hub.studies.compare.records import ORDINARY, Arm

RECIPE = Path(__file__).parents[1] / "recipes" / "train.py"


class TrainingError(Exception):
    """A command ended with an error, which it has printed itself."""


@dataclass(frozen=True)
class Run:
    """One training of one arm from one seed.

    Args:
        lam: of TrAct; None is ordinary training.
        seed: of weights, batches and augmentation.
        accuracies: on the test images after every epoch.
        diverged: whether a loss was no number, so that it ended early.

    """

    lam: float | None
    seed: int
    accuracies: tuple[float, ...]
    diverged: bool


@dataclass(frozen=True)
class Trained:
    """All runs of a part.

    Args:
        part: which.
        runs: every arm from every seed.
        step_ratios: time of a training step by λ, divided by the ordinary one's.
        made_by: versions and device; must be the same in all parts of a study.
        data: what it was trained on, in words.

    """

    part: Part
    runs: tuple[Run, ...]
    step_ratios: dict[float, float]
    made_by: dict[str, Any]
    data: str


def train(study: Study, part: Part, data: str, out: Path, launch: str) -> Trained:
    """Run a part's commands, and read what they wrote; what is finished is not trained again.

    Args:
        study: says which command.
        part: what to train.
        data: a path, or a hub name.
        out: where all studies keep their runs.
        launch: what stands before the script or ``-m module``, such as ``accelerate launch``.

    Raises:
        TrainingError: a command said why.

    """
    start = shlex.split(launch) if launch else [sys.executable]
    folder = out / part.folder
    part = _with_weights(study, part, out)
    commands, read = {"compare": (_compare, _read_compare), "recipe": (_recipes, _read_recipes)}[
        study.by
    ]
    for command in commands(part, data, folder):
        # The command's own tables say less than the study's; progress goes to stderr.
        if subprocess.run([*start, *command, *study.others], stdout=subprocess.DEVNULL).returncode:
            raise TrainingError(shlex.join(command))
    return read(part, folder)


def _with_weights(study: Study, part: Part, out: Path) -> Part:
    """Replace the name of the part that weights come from by its first seed's file."""
    name = part.options.get("weights")
    if name is None:
        return part
    source = next(other for other in study.parts if other.name == name)
    file = out / source.folder / "runs" / f"{ORDINARY.slug}-seed{source.seeds[0]}.safetensors"
    return replace(part, options={**part.options, "weights": str(file)})


def _compare(part: Part, data: str, out: Path) -> Iterator[list[str]]:
    lams = ",".join(map(str, part.lams)) or "none"
    seeds = ",".join(map(str, part.seeds))
    words = ["-m", "tract_hub", "compare", "--data", data, "--out", str(out)]
    words += ["--epochs", str(part.epochs), "--lam", lams, "--seeds", seeds]
    for name, value in part.options.items():
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{name}"] if item is True else [f"--{name}", str(item)]
    yield words


def _recipes(part: Part, data: str, out: Path) -> Iterator[list[str]]:
    options = dict(part.options)
    recipe = options.pop("recipe")
    changes = [f"{name}={value}" for name, value in options.items()]
    for lam in (None, *part.lams):
        arm = ["--ordinary"] if lam is None else [f"lam={lam}"]
        for seed in part.seeds:
            folder = _recipe_folder(out, lam, seed)
            words = [str(RECIPE), recipe, *changes, *arm]
            words += [f"epochs={part.published}", "--budget", str(part.epochs / part.published)]
            yield [*words, "--data", data, "--seed", str(seed), "--out", str(folder), "--resume"]


def _recipe_folder(out: Path, lam: float | None, seed: int) -> Path:
    return out / f"{Arm(lam).slug}-seed{seed}"


def _read_compare(part: Part, folder: Path) -> Trained:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    runs = tuple(
        Run(
            run["arm"]["lam"],
            run["seed"],
            tuple(epoch["accuracy"] for epoch in run["epochs"]),
            run["diverged_at"] is not None,
        )
        for run in results["runs"]
    )
    ratios = {arm["arm"]["lam"]: arm["overhead"] for arm in results["summary"]}
    made_by = {"versions": results["identity"]["versions"], **results["environment"]}
    data = results["identity"]["data"]
    counts = f"{data['train_images']} training and {data['test_images']} test images"
    described = f"{counts} of {len(data['classes'])} classes, {data['size']} pixels"
    return Trained(part, runs, {lam: ratios[lam] for lam in part.lams}, made_by, described)


def _read_recipes(part: Part, folder: Path) -> Trained:
    runs, seconds, history = [], {}, {}
    for lam in (None, *part.lams):
        for seed in part.seeds:
            text = (_recipe_folder(folder, lam, seed) / "history.json").read_text(encoding="utf-8")
            history = json.loads(text)
            epochs = history["epochs"]
            runs.append(Run(lam, seed, tuple(e["top1"] for e in epochs), diverged=False))
            seconds.setdefault(lam, []).extend(e["seconds"] for e in epochs)
    ordinary = statistics.median(seconds[None])
    ratios = {lam: statistics.median(seconds[lam]) / ordinary for lam in part.lams}
    size = history["settings"]["transform"]["input_size"]
    described = f"{history['settings']['classes']} classes, {size} pixels"
    return Trained(part, tuple(runs), ratios, history["made_by"], described)
