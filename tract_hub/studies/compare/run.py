"""``tract-hub compare``: train what has not been trained yet, and show and write what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from tract_hub.studies.compare import identity
from tract_hub.studies.compare.aggregate import compare_runs
from tract_hub.studies.compare.outcome import Outcome, write_outcome
from tract_hub.studies.compare.progress import Progress, make_progress
from tract_hub.studies.compare.records import ORDINARY, Arm, RunRecord
from tract_hub.studies.compare.store import Store
from tract_hub.studies.compare.study import Study, make_study
from tract_hub.studies.compare.timing import time_steps
from tract_hub.studies.compare.training import fresh_model, state_digest, train_run
from tract_hub.studies.settings import CompareSettings

RUNS_FOLDER = Path("tract-hub-runs")


def compare(
    settings: CompareSettings,
    console: Console,
    progress_console: Console,
    report: bool = False,
) -> Path:
    """Train what has not been trained yet, and show and write the comparison.

    Args:
        settings: all choices.
        console: for tables and remarks.
        progress_console: for the progress bar.
        report: write ``report.html`` too; one that an earlier command wrote is always renewed.

    Returns:
        The folder with ``results.json``, ``results.csv``, ``table.md`` and ``compare.png``.

    Raises:
        TractError: the model, the data or a setting cannot be used.

    """
    study = make_study(settings)
    main = study.accelerator.is_main_process
    store = _store(study)
    report = report or store.has_report()
    if main:
        store.open()
        _announce(console, study, store)
    runs = _all_runs(study, store, progress_console)
    timing = _timing(study, store)
    if main:
        outcome = Outcome(runs, compare_runs(runs, timing), timing)
        write_outcome(study, store, outcome, console, report)
    study.accelerator.wait_for_everyone()
    return store.folder


def _store(study: Study) -> Store:
    start = state_digest(fresh_model(study, ORDINARY, study.settings.seeds[0]))
    found = identity.identity_of(
        study.settings, study.data, study.plan.size, start, study.accelerator
    )
    folder = study.settings.out or RUNS_FOLDER / f"compare-{identity.fingerprint(found)}"
    return Store(folder, found)


def _announce(console: Console, study: Study, store: Store) -> None:
    for remark in study.plan.remarks:
        console.print(remark, markup=False, highlight=False)
    arms, seeds = study.arms, study.settings.seeds
    done = sum(store.load(arm, seed) is not None for seed in seeds for arm in arms)
    if done:
        total = len(arms) * len(seeds)
        console.print(f"resuming: {done} of {total} runs are done", markup=False, highlight=False)


def _all_runs(study: Study, store: Store, console: Console) -> list[RunRecord]:
    settings = study.settings
    wanted = [(arm, seed) for seed in settings.seeds for arm in study.arms]
    missing = _missing(study, store, wanted)
    main = study.accelerator.is_main_process
    if missing and main:
        store.forget_results()
    per_run = settings.epochs * study.steps_per_epoch
    made: dict[tuple[Arm, int], RunRecord] = {}
    with make_progress(console, len(missing), len(missing) * per_run, main) as progress:
        for arm, seed in missing:
            made[arm, seed] = _one_run(study, store, arm, seed, progress)
    if not main:
        return []
    found = {key: made.get(key) or store.load(*key) for key in wanted}
    ordered = sorted(wanted, key=lambda key: study.arms.index(key[0]))
    return [run for key in ordered if (run := found[key]) is not None]


def _missing(study: Study, store: Store, wanted: list[tuple[Arm, int]]) -> list[tuple[Arm, int]]:
    """Return what is left to train; the main process looks, for the others may not see its disk."""
    from accelerate.utils import broadcast_object_list

    weights = study.settings.save_weights
    missing = [[key for key in wanted if not store.has(*key, weights=weights)]]
    broadcast_object_list(missing)
    return missing[0]


def _one_run(study: Study, store: Store, arm: Arm, seed: int, progress: Progress) -> RunRecord:
    progress.run_began(f"{arm}, seed {seed}")
    keep = store.weights_of(arm, seed) if study.settings.save_weights else None
    run = train_run(study, arm, seed, progress, keep)
    if study.accelerator.is_main_process:
        store.save(run)
    study.accelerator.free_memory()
    progress.run_ended((study.settings.epochs - len(run.epochs)) * study.steps_per_epoch)
    return run


def _timing(study: Study, store: Store) -> dict[str, Any]:
    from accelerate.utils import broadcast_object_list

    found = [store.load_timing(study.arms)]
    broadcast_object_list(found)
    if found[0] is not None:
        return found[0]
    timing = time_steps(study)
    if study.accelerator.is_main_process:
        store.save_timing(timing)
    return timing
