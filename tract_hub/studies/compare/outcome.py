"""What a comparison writes and prints once all its runs are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tract_hub.errors import ModelError
from tract_hub.studies.compare import identity
from tract_hub.studies.compare.aggregate import Comparison
from tract_hub.studies.compare.facts import facts_of
from tract_hub.studies.compare.plots import draw
from tract_hub.studies.compare.records import RunRecord
from tract_hub.studies.compare.results import results_csv, results_json
from tract_hub.studies.compare.store import REPORT, RESULT_FILES, Store, to_json
from tract_hub.studies.compare.study import Study
from tract_hub.studies.compare.tables import (
    Cells,
    accuracy_table,
    facts_table,
    gain_table,
    print_tables,
    to_markdown,
)
from tract_hub.studies.files import written


@dataclass(frozen=True)
class Outcome:
    """What was measured.

    Args:
        runs: every arm with every seed.
        comparison: of the arms.
        timing: the step times.

    """

    runs: list[RunRecord]
    comparison: Comparison
    timing: dict[str, Any]


def write_outcome(
    study: Study, store: Store, outcome: Outcome, console: Console, report: bool
) -> None:
    """Write numbers, tables, the picture and the report, if it was asked for; print the tables."""
    classes = len(study.data.source.classes)
    title = f"{study.plan.name} on {study.data.source.name}, with and without TrAct"
    command = identity.command_of(study.settings)
    tables = (
        facts_table(facts_of(study)),
        accuracy_table(outcome.comparison),
        gain_table(outcome.comparison, on_gpu=study.accelerator.device.type != "cpu"),
    )
    facts = {
        "title": title,
        "command": command,
        "stem": str(study.stems[0]),
        "identity": store.identity,
        "environment": identity.environment(study.accelerator),
    }
    numbers = to_json(results_json(outcome.runs, outcome.comparison, outcome.timing, facts))
    picture = draw(outcome.comparison, outcome.runs, title, classes)
    store.write_result("results.csv", results_csv(outcome.runs))
    store.write_result("compare.png", picture)
    store.write_result("table.md", to_markdown(title, tables, command))
    store.write_result("results.json", numbers)
    if report:
        store.write_result(REPORT, _page(study, store, outcome, (title, command, *tables)))
    _show(console, tables, store.folder, report)


def _page(
    study: Study,
    store: Store,
    outcome: Outcome,
    texts: tuple[str, str, Cells, Cells, Cells],
) -> str:
    from tract_hub.studies.compare.report.page import Report, render

    return render(
        Report(
            *texts,
            outcome.comparison,
            outcome.runs,
            len(study.data.source.classes),
            _contributions(study, store),
            store.identity["versions"],
        )
    )


def _contributions(study: Study, store: Store) -> dict[str, Any] | str:
    """Return what single images give to the first layer, or why that cannot be told."""
    from tract_hub.studies.compare.report.contributions import measure_contributions

    found = store.load_contributions(study.arms)
    if found is not None:
        return found
    try:
        measured = measure_contributions(study)
    except ModelError as error:
        return str(error)
    store.save_contributions(measured)
    return measured


def _show(console: Console, tables: Sequence[Cells], folder: Path, report: bool) -> None:
    print_tables(console, tables)
    names = [name for name in RESULT_FILES if report or name != REPORT]
    console.print(written(folder, *names), markup=False, highlight=False, soft_wrap=True)
