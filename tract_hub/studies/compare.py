"""``tract-hub compare``: does TrAct help, how much, and how sure is that."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tract_hub.errors import ModelError, SettingsError, first_line
from tract_hub.studies import table
from tract_hub.studies.data import ImageData, fit, load_images
from tract_hub.studies.machine import machine
from tract_hub.studies.models import build_classifier, logits_of, own_size, usual_recipe
from tract_hub.studies.page import write_page
from tract_hub.studies.picture import draw, draw_lengths
from tract_hub.studies.settings import ORDINARY, Arm, Compare, Run
from tract_hub.studies.timing import ratios, take_turns
from tract_hub.studies.train import Experiment, Training, make_accelerator, train
from tract_hub.studies.verdict import Study, outcomes, summary

TIMED_TURNS, TIMED_SECONDS = 15, 20
"""Most turns of timed steps (the medians of two runs then agree within 1 to 2 % on shared cores),
and seconds in which one process has to make them; several wait for each other at each step."""
BLOWN_UP = 2
"""Times the images' own side from which on resizing is warned of."""


def compare(settings: Compare) -> None:
    """Train what is not trained yet, and answer."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    experiment = prepare(settings)
    settings, main = experiment.settings, experiment.accelerator.is_main_process
    folder = settings.folder()
    check_identity(folder, experiment)
    step, step_ratios = step_times(experiment, folder)
    grid, arms = planned(settings)
    done = finished(folder)
    trained = {(arm, epochs, seed) for arm, epochs, _, seed in done}  # at the rate that was chosen
    left = {run for run in grid if run.key not in done}
    left |= {run for run in arms if (run.arm.name, run.epochs, run.seed) not in trained}
    epochs_left = sum(run.epochs for run in left)
    if main and left:
        say(estimate(experiment, epochs_left, step, step_ratios))
    progress = Progress(epochs_left, main, experiment.metric)
    train_all(experiment, grid, folder, progress)
    chosen = choose_lr(folder, experiment)
    train_all(experiment, [replace(run, lr=chosen[run.epochs]) for run in arms], folder, progress)
    progress.bar.close()
    if main:
        answer(experiment, folder, chosen, step_ratios)


def say(*lines: str) -> None:
    """Print lines at once, also where output is piped."""
    print(*lines, sep="\n", flush=True)


class Progress:
    """Epochs that are done, of all: a bar on a terminal, a line an epoch elsewhere."""

    def __init__(self, total: int, shown: bool, metric: str) -> None:
        self.total, self.done, self.shown, self.metric = total, 0, shown, metric
        self.began = time.perf_counter()
        self.bar = tqdm(total=total, unit="epoch", disable=not (shown and sys.stderr.isatty()))

    def __call__(self, row: dict[str, Any]) -> None:
        """Note an epoch's row."""
        self.done += 1
        text = (
            f"{row['arm']}, lr {row['lr']:g}, seed {row['seed']}, epoch {row['epoch']} of "
            f"{row['epochs']}: accuracy {row[self.metric]:.1%}"
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.shown and self.bar.disable:
            each = (time.perf_counter() - self.began) / self.done
            left = tqdm.format_interval(each * max(0, self.total - self.done))
            say(f"{text} ({self.done} of {self.total}, {left} left)")


def prepare(settings: Compare) -> Experiment:
    """Open the data, find the image size that the model takes, and fill in the recipe."""
    accelerator = make_accelerator(settings.device, settings.precision)
    data = load_images(settings.data, settings.channels, settings.max_train, settings.max_test)
    model, size = fitted_model(settings, data)
    settings = usual_recipe(settings, model)
    study = "-".join(settings.names())
    experiment = Experiment(study, settings, fit(data, size), size, accelerator)
    if accelerator.is_main_process:
        say(*opening(experiment))
    return experiment


def fitted_model(settings: Compare, data: ImageData) -> tuple[nn.Module, int]:
    """Return a model and an image size that it runs at: the images' own, else the model's."""
    sizes = [settings.image_size] if settings.image_size else [data.native_size, None]
    problem = ModelError("")
    for size in dict.fromkeys(sizes):
        try:
            model = build_classifier(settings, data, size)
            side = size or own_size(model)
            if side is None:
                raise ModelError(f"{settings.model} does not say its image size: --image-size")
            check_output(model.eval(), settings.model, data, side)
            return model, side
        except ModelError as error:
            problem = error
    raise problem


def check_output(model: nn.Module, name: str, data: ImageData, size: int) -> None:
    """Run two blank images through a model, which has to give a score for each class."""
    try:
        with torch.no_grad():
            output = model(torch.zeros(2, data.channels, size, size))
    except Exception as error:  # anybody's forward
        shape = f"{data.channels} × {size} × {size}"
        said = first_line(error)
        raise ModelError(f"{name} does not run on images of {shape}: {said}") from error
    found = tuple(logits_of(output).shape)
    if found != (2, len(data.classes)):
        raise ModelError(
            f"{name} gives {found} for two images, not {(2, len(data.classes))}: it is no image "
            "classifier, or its number of classes is fixed; choose another model"
        )


def opening(experiment: Experiment) -> list[str]:
    """Say what will be trained, and what is unusual about it."""
    settings, data, size = experiment.settings, experiment.data, experiment.size
    lr = " ".join(f"{value:g}" for value in settings.lr)
    lines = [
        f"{title(experiment)}, {len(data.test)} test images, {len(data.classes)} classes",
        f"  {settings.optimizer}, lr {lr}, weight decay {settings.weight_decay:g}, "
        f"{settings.schedule} schedule, warm-up {settings.warmup:g} epochs, label smoothing "
        f"{settings.label_smoothing:g}, batch {settings.batch_size}, augmentation "
        f"{settings.augment}, pixels {settings.pixels}",
        *(f"  {remark}" for remark in data.remarks),
    ]
    if data.balanced:
        counts = [f"{c} {n}" for c, n in zip(data.classes, data.counts["train"], strict=True)]
        shown = ", ".join(counts[:12]) + (" …" if len(counts) > 12 else "")
        lines.append(f"  classes are uneven ({shown}): accuracy is the mean of the classes' own")
    native = data.native_size
    if native is None and not settings.image_size:
        lines.append(f"  images are resized to {size} × {size}; --image-size changes it")
    if native and size >= BLOWN_UP * native:
        times = (size / native) ** 2
        lines.append(
            f"  warning: images of {native} pixels are blown up to {size}, {times:.0f} times the "
            f"work; where the model can, pass --image-size {native}"
        )
    return lines


def title(experiment: Experiment) -> str:
    """Name model and data as they are."""
    model, data = experiment.settings.names()
    if experiment.settings.model_arg:
        model += f" ({', '.join(experiment.settings.model_arg)})"
    shape = f"{experiment.data.channels} × {experiment.size} × {experiment.size}"
    return f"{model} on {data}: {len(experiment.data.train)} training images of {shape}"


def check_identity(folder: Path, experiment: Experiment) -> None:
    """Note what all runs of a folder share, or refuse a folder of other ones."""
    data, path = experiment.data, folder / "study.json"
    mine: dict[str, Any] = {
        "study": experiment.study,
        "settings": experiment.settings.identity(),
        "data": {"classes": list(data.classes), **data.counts, "size": experiment.size},
        "metric": experiment.metric,
        "test_labels": table.pack(data.test.labels.numpy()),
    }
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(key, name) for key in ("settings", "data") for name in mine[key]]
        for key, name in pairs:
            value, old = mine[key][name], there[key].get(name, mine[key][name])
            if old != value:
                raise SettingsError(
                    f"{folder} holds runs with {name} {old}, not {value}: pass another --out"
                )
    elif experiment.accelerator.is_main_process:
        table.write_atomically(path, json.dumps(mine, ensure_ascii=False, indent=1) + "\n")
    experiment.accelerator.wait_for_everyone()


def step_times(experiment: Experiment, folder: Path) -> tuple[float, dict[str, float]]:
    """Return seconds of an ordinary training step, and the arms' as ratios; measured once."""
    path = folder / "timing.json"
    arms = [arm for arm in experiment.settings.arms() if not arm.rescaled]
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if {arm.name for arm in arms} <= set(known["ratios"]):
            return known["seconds"], known["ratios"]
    accelerator = experiment.accelerator
    if accelerator.is_main_process:
        say("  measuring a training step …")
    steps = {arm.name: first_step(experiment, arm) for arm in arms}
    budget = TIMED_SECONDS if accelerator.num_processes == 1 else float("inf")
    turns = take_turns(steps, accelerator.device, budget, TIMED_TURNS + 2)[2:]
    seconds = statistics.median(turn[ORDINARY.name] for turn in turns)
    by_arm = {name: statistics.median(ratios(turns, name)) for name in steps}
    accelerator.free_memory()
    if accelerator.is_main_process:
        content = {"seconds": seconds, "ratios": by_arm, "machine": machine()}
        table.write_atomically(path, json.dumps(content, ensure_ascii=False) + "\n")
    return seconds, by_arm


def first_step(experiment: Experiment, arm: Arm) -> Callable[[], Tensor]:
    """Return what takes an arm's first step again and again."""
    training = Training(experiment, Run(arm, 1, 1e-6, 0))
    training.images.draw(0)
    images, labels = next(iter(training.train))
    training.model.train()
    return partial(training.step, experiment.to_model(images), labels)


def estimate(
    experiment: Experiment, epochs: int, step: float, step_ratios: dict[str, float]
) -> str:
    """Say how long the epochs that are left will take; a forward is taken for a third of a step."""
    data = experiment.data
    steps = (len(data.train) + len(data.test) / 3) / experiment.settings.batch_size
    costs = [f"{arm} {cost:.3f}" for arm, cost in step_ratios.items() if arm.startswith("TrAct")]
    shown = f"; over an ordinary one: {', '.join(costs)}" if costs else ""
    about = f"about {tqdm.format_interval(epochs * steps * step)} for {epochs} epochs"
    return f"  step {1000 * step:.0f} ms{shown}\n  {about}\n"


def planned(settings: Compare) -> tuple[list[Run], list[Run]]:
    """Return the runs that choose the learning rate, and those that are compared.

    The latter have the first learning rate until one is chosen.
    """
    lengths, seeds, rates = settings.lengths(), settings.seed_range(), settings.lr
    few = seeds[: settings.grid_seeds]
    grid = [Run(ORDINARY, n, lr, seed) for n in lengths for lr in rates for seed in few]
    arms = [
        Run(arm, epochs, rates[0], seed)
        for epochs in lengths
        for seed in seeds
        for arm in settings.arms()
        if epochs in settings.lengths(arm)
    ]
    return (grid if len(rates) > 1 else []), arms


def finished(folder: Path) -> set[tuple[str, int, float, int]]:
    """Return the keys of the runs whose last epoch is in the table."""
    rows = table.read(folder / "runs.jsonl")
    last = rows[rows["epoch"] == rows["epochs"]]
    return set(last[table.RUN].itertuples(index=False, name=None))


def train_all(experiment: Experiment, runs: list[Run], folder: Path, progress: Progress) -> None:
    """Train the runs that are not finished; all processes then see the same table."""
    experiment.accelerator.wait_for_everyone()
    done = finished(folder)
    for run in runs:
        if run.key not in done:
            train(Training(experiment, run), folder, progress)
    experiment.accelerator.wait_for_everyone()


def final_by_lr(folder: Path, experiment: Experiment) -> pd.Series:
    """Return the final accuracy of the runs that choose the learning rate, by length and rate."""
    grid, _ = planned(experiment.settings)
    rows = table.read(folder / "runs.jsonl")
    last = rows[rows["epoch"] == rows["epochs"]].set_index(table.RUN)
    return last.loc[[run.key for run in grid]].groupby(["epochs", "lr"])[experiment.metric].mean()


def choose_lr(folder: Path, experiment: Experiment) -> dict[int, float]:
    """Return by length the rate that ordinary training ends best with; of equals, the smaller."""
    lengths, rates = experiment.settings.lengths(), experiment.settings.lr
    if len(rates) == 1:
        return dict.fromkeys(lengths, rates[0])
    means = final_by_lr(folder, experiment)
    return {epochs: float(means[epochs].idxmax()) for epochs in lengths}


def answer(
    experiment: Experiment, folder: Path, chosen: dict[int, float], step_ratios: dict[str, float]
) -> None:
    """Print the verdict first, and write it with picture and table; rates are chosen by length."""
    settings = experiment.settings
    rows = table.read(folder / "runs.jsonl")
    rows = rows[rows["seed"].isin(settings.seed_range())]
    study = Study(experiment.metric, experiment.data.test.labels.numpy(), chosen)
    longest_first = sorted(settings.epochs, reverse=True)
    pairs = [(arm.name, n) for n in longest_first for arm in settings.arms() if arm != ORDINARY]
    found = outcomes(rows, study, pairs, step_ratios)
    rates = []
    if len(settings.lr) > 1:
        grid = final_by_lr(folder, experiment).unstack("lr").round(4)
        rates = [f"lr {lr:g} for {n} epochs" for n, lr in chosen.items()]
        say("", "Ordinary training by epochs and learning rate:", grid.to_string(), *rates)
    if not found:
        return
    lines = summary(found)
    picture = draw(study, found, title(experiment), longest_first[0])
    facts = [*opening(experiment), *rates, f"on {machine()}"]
    page = write_page(title(experiment), found, picture, lines, facts, sys.argv[1:])
    csv = lines.assign(verdict=[one.sentence for one in found]).to_csv(index=False)
    files = {"compare.png": picture, "table.csv": csv, "report.html": page}
    if len(chosen) > 1:
        arms = list(dict.fromkeys(arm.name for arm in settings.arms()))
        files["lengths.png"] = draw_lengths(rows, study, arms, title(experiment))
    for name, content in files.items():
        table.write_atomically(folder / name, content)
    say("", *(one.sentence for one in found), "")
    say(lines.set_index("arm").T.to_string(line_width=78), "")
    say(f"written to {folder}: {', '.join(files)}, runs.jsonl")
