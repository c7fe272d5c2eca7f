"""A comparison as tables, on the terminal and in Markdown, from the same cells."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tract_hub.studies.compare.aggregate import ArmSummary, Comparison

NOTES = (
    "Accuracy is measured on the test images after every epoch; no best epoch is picked. "
    "± is the sample standard deviation over seeds.",
    "“Epochs to reach” is the first epoch at which the mean accuracy over seeds is at least the "
    "ordinary model's mean accuracy after its last epoch. The ratio divides it by the first epoch "
    "at which the ordinary model's own mean curve is that high. Every arm runs the whole schedule "
    "of the learning rate, so this is no run with a shortened schedule.",
    "“Gain” pairs the seeds: both arms of a seed had the same initial weights and saw the same "
    "batches in the same order, checked by digests.",
    "Step times are of forward, backward and optimizer step on one batch, measured with the arms "
    "taking turns; the ratio is the median, with quartiles, of the turns' ratios. Only a GPU's are "
    "shown as such, as a median: a CPU's depend on what else it does.",
)
LINES_ON_TERMINAL = 25


@dataclass(frozen=True)
class Cells:
    """A table's text.

    Args:
        title: above it.
        head: one a column.
        rows: as many cells each.

    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def facts_table(facts: Iterable[tuple[str, str]]) -> Cells:
    """Return what was compared, line by line."""
    return Cells("What was compared", ("setting", "value"), tuple(facts))


def accuracy_table(comparison: Comparison) -> Cells:
    """Return the test accuracy by epoch, every arm a column."""
    arms = comparison.arms
    count = max(len(arm.accuracy.mean) for arm in arms)
    rows = [(str(i + 1), *(_accuracy_at(arm, i) for arm in arms)) for i in range(count)]
    return Cells("Test accuracy by epoch", ("epoch", *(_heading(a) for a in arms)), tuple(rows))


def gain_table(comparison: Comparison, on_gpu: bool = False) -> Cells:
    """Return what every arm gained, and what it cost.

    Args:
        comparison: of the arms.
        on_gpu: whether the step times are a GPU's, and so to be shown.

    """
    target = comparison.target
    goal = "the target" if target is None else _percent(target)
    lines: list[tuple[str, list[str]]] = [
        ("final accuracy", [_accuracy_at(arm, -1) for arm in comparison.arms]),
        ("gain over ordinary, paired", [_gain(arm) for arm in comparison.arms]),
        (f"epochs to reach {goal}", [_reached(arm, target) for arm in comparison.arms]),
        ("ratio of epochs", [_ratio(arm) for arm in comparison.arms]),
        ("epochs to reach, seed by seed", [_by_seed(arm) for arm in comparison.arms]),
    ]
    if on_gpu:
        lines.append(("step time", [_milliseconds(arm.step_seconds) for arm in comparison.arms]))
    lines.append(("step time ratio", [_overhead(arm) for arm in comparison.arms]))
    if any(arm.diverged for arm in comparison.arms):
        lines.append(("diverged", [_diverged(arm) for arm in comparison.arms]))
    head = ("", *(_heading(arm) for arm in comparison.arms))
    said = [(name, *cells) for name, cells in lines if any(cells)]
    compared = any(arm.arm.lam is not None for arm in comparison.arms)
    return Cells("What TrAct gained" if compared else "What came of it", head, tuple(said))


def _heading(arm: ArmSummary) -> str:
    return str(arm.arm)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.{0 if seconds >= 1 else 2}f} ms"


def _overhead(arm: ArmSummary) -> str:
    if arm.arm.lam is None:
        return ""
    first, third = arm.overhead_quartiles
    return f"{arm.overhead:.3f} ({first:.3f} to {third:.3f})"


def _accuracy_at(arm: ArmSummary, index: int) -> str:
    if not arm.accuracy.mean:
        return "diverged"
    mean = f"{arm.accuracy.mean[index] * 100:.1f} %"
    if len(arm.seeds) < 2:  # one seed says nothing of the spread
        return mean
    return f"{mean} ± {arm.accuracy.spread[index] * 100:.1f}"


def _gain(arm: ArmSummary) -> str:
    if arm.arm.lam is None:
        return ""
    points = [gain * 100 for gain in arm.gain.values()]
    if not points:
        return "no pair"
    mean = f"{statistics.fmean(points):+.1f}"
    if len(points) < 2:
        return f"{mean} points"
    return f"{mean} ± {statistics.stdev(points):.1f} points"


def _reached(arm: ArmSummary, target: float | None) -> str:
    if target is None:
        return "no target"
    return "not reached" if arm.reached is None else str(arm.reached)


def _ratio(arm: ArmSummary) -> str:
    if arm.arm.lam is None:
        return ""
    return "—" if arm.ratio is None else f"{arm.ratio:.2f}"


def _by_seed(arm: ArmSummary) -> str:
    epochs = arm.reached_by_seed.values()
    return ", ".join("not reached" if epoch is None else str(epoch) for epoch in epochs)


def _diverged(arm: ArmSummary) -> str:
    return "; ".join(f"seed {seed} diverged at epoch {e}" for seed, e in arm.diverged.items())


def print_tables(console: Console, tables: Sequence[Cells]) -> None:
    """Print tables; of a long one, evenly chosen lines with the first and the last."""
    for cells in tables:
        table = Table(title=cells.title, box=box.SIMPLE_HEAD, title_justify="left")
        for i, name in enumerate(cells.head):
            table.add_column(name, justify="left" if i == 0 else "right")
        if cells.head == ("setting", "value"):
            table.columns[1].justify = "left"
        for row in _thinned(cells.rows):
            table.add_row(*row)
        console.print(table)


def _thinned(rows: Sequence[Any]) -> list[Any]:
    if len(rows) <= LINES_ON_TERMINAL:
        return list(rows)
    last = LINES_ON_TERMINAL - 1
    return [rows[round(i * (len(rows) - 1) / last)] for i in range(LINES_ON_TERMINAL)]


def to_markdown(title: str, tables: Sequence[Cells], command: str) -> str:
    """Return a page with all tables, their notes, and the command that made them.

    Args:
        title: of the page.
        tables: in order.
        command: as one would type it.

    """
    parts = [f"# {title}", f"Written by `{command}`.", *(_markdown(cells) for cells in tables)]
    return "\n\n".join([*parts, *NOTES]) + "\n"


def _markdown(cells: Cells) -> str:
    rule = [
        "---",
        *("---" if cells.head == ("setting", "value") else "--:" for _ in cells.head[1:]),
    ]
    lines = [_line(cells.head), _line(rule), *(_line(row) for row in cells.rows)]
    return f"## {cells.title}\n\n" + "\n".join(lines)


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
