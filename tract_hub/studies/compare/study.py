"""``tract-hub compare``: the same model from the same seeds, with and without TrAct."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import tract_hub
from tract_hub.errors import ModelError
from tract_hub.studies.compare import identity
from tract_hub.studies.compare.aggregate import Comparison, compare_runs
from tract_hub.studies.compare.devices import make_accelerator
from tract_hub.studies.compare.optim import check_optimizer
from tract_hub.studies.compare.plots import draw
from tract_hub.studies.compare.progress import Progress, make_progress
from tract_hub.studies.compare.records import ORDINARY, Arm, RunRecord
from tract_hub.studies.compare.results import results_csv, results_json
from tract_hub.studies.compare.store import REPORT, Store, to_json
from tract_hub.studies.compare.tables import (
    Cells,
    accuracy_table,
    facts_table,
    gain_table,
    print_tables,
    to_markdown,
)
from tract_hub.studies.compare.timing import time_steps
from tract_hub.studies.compare.training import Study, fresh_model, state_digest, train_run
from tract_hub.studies.images.prepared import Prepared, prepare, train_loader
from tract_hub.studies.images.sources import load_source
from tract_hub.studies.models.plan import plan_model
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
    study, stem = make_study(settings)
    main = study.accelerator.is_main_process
    store = _store(study)
    report = report or store.has_report()
    if main:
        store.open()
        _announce(console, study, store)
    runs = _all_runs(study, store, progress_console)
    timing = _timing(study, store)
    if main:
        comparison = compare_runs(runs, timing)
        _write(study, stem, store, (runs, comparison, timing), console, report)
    study.accelerator.wait_for_everyone()
    return store.folder


def arms_of(settings: CompareSettings) -> list[Arm]:
    """Return the ordinary arm, and one for every λ there is."""
    return [ORDINARY, *(Arm(lam) for lam in settings.lams)]


def make_study(settings: CompareSettings) -> tuple[Study, Any]:
    """Check everything that can be checked before any training.

    Args:
        settings: all choices.

    Returns:
        What all runs share, and the first layer that was found.

    Raises:
        TractError: the model, the data or a setting cannot be used.

    """
    check_optimizer(settings.optimizer)
    source = load_source(
        settings.data,
        settings.channels,
        settings.max_train,
        settings.max_test,
        settings.classes,
    )
    plan = plan_model(settings, source)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    accelerator = make_accelerator(settings.device, settings.precision, settings.batch_size)
    data = prepare(source, plan.size).to(accelerator.device)
    train_loader(data, settings.augment, settings.batch_size, 0, settings.workers)
    stems = tract_hub.locate(plan.build(), example_inputs=plan.example())
    names = tuple(stem.weight_name for stem in stems)
    return Study(settings, data, plan, names, accelerator), stems[0]


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
    arms, seeds = arms_of(study.settings), study.settings.seeds
    done = sum(store.load(arm, seed) is not None for seed in seeds for arm in arms)
    if done:
        total = len(arms) * len(seeds)
        console.print(f"resuming: {done} of {total} runs are done", markup=False, highlight=False)


def _all_runs(study: Study, store: Store, console: Console) -> list[RunRecord]:
    settings = study.settings
    wanted = [(arm, seed) for seed in settings.seeds for arm in arms_of(settings)]
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
    ordered = sorted(wanted, key=lambda key: arms_of(settings).index(key[0]))
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

    arms = arms_of(study.settings)
    found = [store.load_timing(arms)]
    broadcast_object_list(found)
    if found[0] is not None:
        return found[0]
    timing = time_steps(study, arms)
    if study.accelerator.is_main_process:
        store.save_timing(timing)
    return timing


def _write(
    study: Study,
    stem: Any,
    store: Store,
    results: tuple[list[RunRecord], Comparison, dict[str, Any]],
    console: Console,
    report: bool,
) -> None:
    runs, comparison, timing = results
    title = f"{study.plan.name} on {study.data.source.name}, with and without TrAct"
    command = identity.command_of(study.settings)
    tables = (
        facts_table(_facts(study, stem)),
        accuracy_table(comparison),
        gain_table(comparison, on_gpu=study.accelerator.device.type != "cpu"),
    )
    facts = {
        "title": title,
        "command": command,
        "stem": str(stem),
        "identity": store.identity,
        "environment": identity.environment(study.accelerator),
    }
    numbers = to_json(results_json(runs, comparison, timing, facts))
    picture = draw(comparison, runs, title, len(study.data.source.classes))
    store.write_result("results.csv", results_csv(runs))
    store.write_result("compare.png", picture)
    store.write_result("table.md", to_markdown(title, tables, command))
    store.write_result("results.json", numbers)
    if report:
        page = _page(study, stem, store, (runs, comparison), (title, command, *tables))
        store.write_result(REPORT, page)
    _show(console, tables, store.folder, report)


def _page(
    study: Study,
    stem: Any,
    store: Store,
    results: tuple[list[RunRecord], Comparison],
    texts: tuple[str, str, Cells, Cells, Cells],
) -> str:
    from tract_hub.studies.compare.report.page import Report, render

    runs, comparison = results
    classes = len(study.data.source.classes)
    given = _contributions(study, stem, store)
    return render(Report(*texts, comparison, runs, classes, given, store.identity["versions"]))


def _contributions(study: Study, stem: Any, store: Store) -> dict[str, Any] | str:
    """Return what single images give to the first layer, or why that cannot be told."""
    from tract_hub.studies.compare.report.contributions import measure_contributions

    arms = arms_of(study.settings)
    found = store.load_contributions(arms)
    if found is not None:
        return found
    try:
        measured = measure_contributions(study, stem, arms)
    except ModelError as error:
        return str(error)
    store.save_contributions(measured)
    return measured


def _show(console: Console, tables: Sequence[Cells], folder: Path, report: bool) -> None:
    print_tables(console, tables)
    page = f", {REPORT}" if report else ""
    console.print(
        f"written to {os.fspath(folder)}: compare.png, table.md, results.json, results.csv{page}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _facts(study: Study, stem: Any) -> list[tuple[str, str]]:
    settings, data = study.settings, study.data
    arguments = ", ".join(f"{name}={value}" for name, value in settings.model_args)
    ran_on = identity.environment(study.accelerator)
    model = f"{study.plan.name} ({arguments})" if arguments else study.plan.name
    return [
        ("recipe", f"{settings.recipe}, then the command's own options"),
        ("model", model),
        ("fitted", "; ".join(study.plan.remarks) or "nothing"),
        ("stem found", str(stem)),
        ("data", f"{data.source.name}: {_counts(data)}"),
        ("normalised by", _normalisation(study)),
        ("optimizer", _optimizer(settings)),
        ("training", f"{settings.epochs} epochs, batches of {settings.batch_size}"),
        ("augmentation", settings.augment),
        ("seeds", ", ".join(map(str, settings.seeds))),
        ("λ", ", ".join(f"{lam:g}" for lam in settings.lams) or "none"),
        ("device", f"{ran_on['device']}, {ran_on['processes']} process(es), {settings.precision}"),
    ]


def _counts(data: Prepared) -> str:
    shape = f"{data.source.channels} × {data.size} × {data.size}"
    return (
        f"{len(data.train)} training and {len(data.test)} test images, "
        f"{len(data.source.classes)} classes, {shape}"
    )


def _normalisation(study: Study) -> str:
    name, data = study.settings.normalise, study.data
    if name != "standard":
        return {"unit": "nothing: pixels in [0, 1]", "bytes": "nothing: pixels in [0, 255]"}[name]
    mean = ", ".join(f"{value:.3f}" for value in data.mean)
    std = ", ".join(f"{value:.3f}" for value in data.std)
    return f"mean {mean} and deviation {std} of the training images"


def _optimizer(settings: CompareSettings) -> str:
    momentum = f", momentum {settings.momentum:g}" if settings.optimizer == "sgd" else ""
    own = _stem_optimizer(settings)
    warm = f", warm-up {settings.warmup_epochs:g} epochs" if settings.warmup_epochs else ""
    return (
        f"{settings.optimizer}, lr {settings.lr:g} {settings.schedule}{warm}{momentum}, "
        f"weight decay {settings.weight_decay:g}, label smoothing {settings.label_smoothing:g}{own}"
    )


def _stem_optimizer(settings: CompareSettings) -> str:
    if settings.stem_optimizer == "same" and settings.stem_lr is None:
        return ""
    rule = "SGD" if settings.stem_optimizer == "sgd" else settings.optimizer
    return f"; first layer: {rule}, lr {settings.stem_lr or settings.lr:g}"
