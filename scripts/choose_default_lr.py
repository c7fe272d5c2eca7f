"""Train the default recipe's ordinary arm over a grid of learning rates; TrAct takes no part.

Writes docs/results/default-lr-grid.md and .json. The default is the learning rate with the best
mean accuracy on the test images after the last epoch: chosen on the images that the comparison
reports, which can only favour the ordinary arm.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tract_hub.studies.compare.identity import environment
from tract_hub.studies.compare.progress import make_progress
from tract_hub.studies.compare.recipes import DEFAULT_RECIPE, build_settings
from tract_hub.studies.compare.records import ORDINARY, RunRecord
from tract_hub.studies.compare.store import to_json
from tract_hub.studies.compare.study import make_study
from tract_hub.studies.compare.training import Study, train_run
from tract_hub.studies.files import write_atomically
from tract_hub.studies.machine import versions

GRID = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parents[1] / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    study, _ = make_study(build_settings(arguments.recipe, {"seeds": SEEDS}))
    runs = {lr: [] for lr in GRID}
    steps = len(GRID) * len(SEEDS) * study.settings.epochs * study.steps_per_epoch
    with make_progress(Console(stderr=True), len(GRID) * len(SEEDS), steps, True) as progress:
        for lr in GRID:
            for seed in SEEDS:
                progress.run_began(f"lr {lr:g}, seed {seed}")
                at_rate = replace(study, settings=replace(study.settings, lr=lr))
                runs[lr].append(train_run(at_rate, ORDINARY, seed, progress))
                study.accelerator.free_memory()
                progress.run_ended()
    write(arguments.out, study, runs)


def write(out: Path, study: Study, runs: dict[float, list[RunRecord]]) -> None:
    rows = [{"lr": lr, "runs": [summary(run) for run in of_rate]} for lr, of_rate in runs.items()]
    best = max(rows, key=lambda row: mean_of(row))["lr"]
    settings = study.settings.of_a_run()
    del settings["lr"]
    facts = {"settings": settings, "environment": environment(study.accelerator)}
    data = {"best": best, "grid": rows, **facts, "versions": versions()}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "default-lr-grid.json", to_json(data))
    write_atomically(out / "default-lr-grid.md", page(study, rows, best))


def summary(run: RunRecord) -> dict[str, object]:
    accuracy = [epoch.accuracy for epoch in run.epochs]
    return {"seed": run.seed, "diverged_at": run.diverged_at, "accuracy_by_epoch": accuracy}


def finals(row: dict) -> list[float]:
    return [run["accuracy_by_epoch"][-1] for run in row["runs"] if run["diverged_at"] is None]


def mean_of(row: dict) -> float:
    # A rate that loses a seed is no default.
    return statistics.fmean(finals(row)) if len(finals(row)) == len(row["runs"]) else 0.0


def page(study: Study, rows: list[dict], best: float) -> str:
    settings = study.settings
    lines = [
        "# The default recipe's learning rate",
        f"Ordinary training alone, recipe `{settings.recipe}`: {settings.model}, "
        f"{settings.optimizer}, {settings.epochs} epochs, batch {settings.batch_size}, "
        f"{settings.schedule} schedule, seeds {', '.join(map(str, SEEDS))}. "
        "Test accuracy after the last epoch. Written by `python scripts/choose_default_lr.py`.",
        "| learning rate | seed by seed | mean ± sd | |\n| --: | --: | --: | --- |",
    ]
    for row in rows:
        accuracies = finals(row)
        each = ", ".join(f"{a:.1%}" for a in accuracies)
        spread = statistics.stdev(accuracies) * 100 if len(accuracies) > 1 else 0.0
        mark = "default" if row["lr"] == best else ""
        lines[-1] += f"\n| {row['lr']:g} | {each} | {mean_of(row):.1%} ± {spread:.1f} | {mark} |"
    return "\n\n".join(lines).replace("%", " %") + "\n"


if __name__ == "__main__":
    main()
