"""The numbers of a complete comparison as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from tract_hub.studies.compare.aggregate import Comparison
from tract_hub.studies.compare.records import RunRecord

COLUMNS = (
    "arm",
    "lam",
    "seed",
    "epoch",
    "train_loss",
    "test_loss",
    "accuracy",
    "seconds",
    "diverged",
)


def results_json(
    runs: Sequence[RunRecord],
    comparison: Comparison,
    timing: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything that was measured, with what it was measured on.

    Args:
        runs: all of them.
        comparison: their summary.
        timing: the step times.
        facts: settings, versions, device, command.

    """
    return {
        **facts,
        "target_accuracy": comparison.target,
        "summary": [arm.to_json() for arm in comparison.arms],
        "timing": dict(timing),
        "runs": [_without_filters(run) for run in runs],
    }


def _without_filters(run: RunRecord) -> dict[str, Any]:
    record = run.to_json() | {"name": str(run.arm)}
    del record["filters"]
    return record


def results_csv(runs: Sequence[RunRecord]) -> str:
    """Return one line for every arm, seed and epoch."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        lam = "" if run.arm.lam is None else run.arm.lam
        for e in run.epochs:
            diverged = run.diverged_at == e.epoch
            numbers = (e.epoch, e.train_loss, e.test_loss, e.accuracy, round(e.seconds, 4))
            writer.writerow((str(run.arm), lam, run.seed, *numbers, int(diverged)))
    return buffer.getvalue()
