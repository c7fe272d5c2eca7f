"""A study's results: numbers as JSON, tables as Markdown, and the picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from picture import draw
from speedup import CONFIDENCE, Interval, Line, Shorter, lines_of, shorter_schedules
from study import Study
from trainings import Trained

from tract_hub.studies.compare.records import Arm
from tract_hub.studies.files import write_atomically

FORMAT = 1
NOTES = (
    "Final accuracy: on the test images after the last epoch, mean ± sample deviation over seeds; "
    "no best epoch is picked.",
    "Gain: in points, over ordinary training of the same part, length and seed. Brackets: "
    f"{CONFIDENCE:.0%} confidence intervals (Student's t) over paired seeds. “Better” and “worse” "
    "are said only where the interval leaves out zero; several arms are looked at, and no interval "
    "is widened for that.",
    "Ratio of epochs: the first epoch at which a run is at least as good as the ordinary run of "
    "its seed was at the end, over the first at which the ordinary run itself was; geometric mean "
    "over seeds; below 1 is faster. Every arm runs its whole schedule. Where a seed never got "
    "there, the table says how many did. Ratio of time: that times the ratio of a step's times.",
)


def write(study: Study, trained: Sequence[Trained], folder: Path, command: str) -> None:
    """Write study.json, table.md and picture.png.

    Args:
        study: what was asked for.
        trained: all its parts.
        folder: exists.
        command: that makes the same study.

    """
    lines, shorter = lines_of(trained, study.against), shorter_schedules(trained)
    numbers = {
        "format": FORMAT,
        "study": study.name,
        "title": study.title,
        "command": command,
        "scale": study.scale,
        "made_by": trained[0].made_by,
        "data": {t.part.name: t.data for t in trained},
        "lines": [asdict(line) | {"verdict": line.verdict} for line in lines],
        "shorter_schedules": [asdict(line) for line in shorter],
        "runs": [
            {"part": t.part.name, "epochs": t.part.epochs, **asdict(run)}
            for t in trained
            for run in t.runs
        ],
    }
    text = json.dumps(_no_nan(numbers), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "study.json", text + "\n")
    write_atomically(folder / "picture.png", draw(study, trained))
    write_atomically(folder / "table.md", _page(study, trained, (lines, shorter), command))


def _no_nan(value: object) -> object:
    """JSON has no NaN: an interval of one seed has no ends."""
    if isinstance(value, dict):
        return {str(key): _no_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(
    study: Study,
    trained: Sequence[Trained],
    results: tuple[Sequence[Line], Sequence[Shorter]],
    command: str,
) -> str:
    lines, shorter = results
    made_by = trained[0].made_by
    versions = ", ".join(f"{name} {number}" for name, number in made_by["versions"].items())
    seeds = sorted({seed for t in trained for seed in t.part.seeds})
    data = "; ".join(dict.fromkeys(t.data for t in trained))
    parts = [
        f"# {study.title}",
        f"Written by `{command}`. Scale: {study.scale}. Seeds {', '.join(map(str, seeds))}. "
        f"Data: {data}. Ran on {made_by['device']} with {versions}.",
        "![Test accuracy](picture.png)",
        *_listed("What the paper reports", study.paper),
        "## Here",
        *_results(lines, study),
        *_shorter_section(shorter),
        *_listed("What differs from the paper", study.notes),
    ]
    return "\n\n".join(parts) + "\n"


def _results(lines: Sequence[Line], study: Study) -> list[str]:
    if any(line.lam is not None for line in lines):
        return [_table(_HEAD, (_cells(line, study) for line in lines)), *NOTES]
    rows = ([line.part, str(line.epochs), _accuracy(line)] for line in lines)
    return [_table(("part", "epochs", "final accuracy"), rows), NOTES[0]]


_HEAD = (
    "part", "epochs", "arm", "final accuracy", "gain", "", "ratio of epochs", "ratio of time",
)  # fmt: skip


def _cells(line: Line, study: Study) -> list[str]:
    gain = _points(line.gain)
    if study.against and line.part != study.against and line.over_reference:
        over = f"over {study.against}: {_points(line.over_reference)}"
        gain = f"{gain}; {over}" if gain else over
    return [
        line.part,
        str(line.epochs),
        str(Arm(line.lam)),
        _accuracy(line),
        gain,
        line.verdict,
        _ratio(line, line.epoch_ratio),
        _ratio(line, line.time_ratio),
    ]


def _accuracy(line: Line) -> str:
    values = [value * 100 for value in line.accuracies]
    lost = f", {line.diverged} diverged" if line.diverged else ""
    if not values:
        return "diverged"
    mean = f"{statistics.fmean(values):.1f} %"
    return f"{mean}{lost}" if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}{lost}"


def _points(gain: Interval | None) -> str:
    if gain is None:
        return ""
    mean = f"{gain.mean * 100:+.1f}"
    if math.isnan(gain.low):
        return mean
    return f"{mean} [{gain.low * 100:+.1f}, {gain.high * 100:+.1f}]"


def _ratio(line: Line, ratio: Interval | None) -> str:
    if line.lam is None:
        return ""
    if ratio is None:
        return f"{line.reached} of {len(line.accuracies) + line.diverged} seeds got there"
    if math.isnan(ratio.low):
        return f"{ratio.mean:.2f}"
    return f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _shorter_section(shorter: Sequence[Shorter]) -> list[str]:
    if not shorter:
        return []
    rows = (
        [
            s.part,
            f"λ={s.lam:g}, {s.epochs} epochs",
            f"{s.ordinary_epochs} epochs",
            f"{s.ordinary_epochs / s.epochs:.2g}×",
            _points(s.gain),
        ]
        for s in shorter
    )
    head = ("part", "TrAct", "ordinary", "fewer epochs", "accuracy, TrAct less ordinary, points")
    return ["## TrAct on a shorter schedule", _table(head, rows)]


def _listed(title: str, items: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(f"- {item}" for item in items)] if items else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
