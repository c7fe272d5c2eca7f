"""The tables of the benchmark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tract_hub.studies.interleaved import Ratio

Table = list[list[str]]
OWN = "of it Gram matrix and solve"
CANNOT_RUN = "cannot run"
_CLOCK = (
    "and the share of the step that the Gram matrix and the solve took by their own clock, which "
    "the machine's noise blurs less"
)


def steps_table(cases: Mapping[str, Mapping[str, Any]], absolute: bool = False) -> Table:
    """Say what each arm adds to the ordinary step: a heading, and one line a case.

    The share of the Gram matrix and the solve has a column where it was clocked, and the ordinary
    step itself where absolute times mean something: on a GPU.
    """
    arms = ("torch_tract", "tract_hub")
    table = [["case", *arms]]
    table += [[name, *(_added(case[arm]) for arm in arms)] for name, case in cases.items()]
    if absolute:
        steps = [
            "ordinary",
            *(f"{1e3 * case['ordinary']['seconds']:.2f} ms" for case in cases.values()),
        ]
        table = [[line[0], cell, *line[1:]] for line, cell in zip(table, steps, strict=True)]
    shares = [case["tract_hub"]["own"] for case in cases.values()]
    if all(share is not None for share in shares):
        column = [OWN, *(f"{share:.2%}" for share in shares)]
        table = [[*line, cell] for line, cell in zip(table, column, strict=True)]
    return table


def _added(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return CANNOT_RUN
    ratio: Ratio = result["ratio"]
    middle, first, third = map(_percent, (ratio.median, ratio.first, ratio.third))
    return f"{middle} ± {_notch(ratio, result['rounds']):.1%} ({first} to {third})"


def _percent(ratio: float) -> str:
    return f"{round(ratio - 1, 3) + 0.0:+.1%}"  # no -0.0


def failures(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say why an arm could not run: one line for all cases with the same reason."""
    names: dict[str, list[str]] = {}
    for name, case in cases.items():
        for arm, result in case.items():
            if "error" in result:
                names.setdefault(f"{arm} {CANNOT_RUN}: {result['error']}", []).append(name)
    return [f"{reason} ({', '.join(those)})" for reason, those in names.items()]


def _notch(ratio: Ratio, rounds: int) -> float:
    """How far the median of as many more rounds may be off, 19 of 20 times: a box plot's notch."""
    return 1.57 * (ratio.third - ratio.first) / math.sqrt(rounds)


def memory_table(peaks: Mapping[str, Mapping[int, float]]) -> Table:
    """Say what each arm adds to the ordinary peak: a heading, and one line a batch size."""
    ordinary = peaks["ordinary"]
    others = [arm for arm in peaks if arm != "ordinary"]
    return [["batch", *others]] + [
        [str(batch), *(f"{peaks[arm][batch] - ordinary[batch]:+.0f} MiB" for arm in others)]
        for batch in ordinary
    ]


def markdown(head: str, steps: Table, memory: Table | None, notes: Sequence[str] = ()) -> str:
    """Write the report, with notes below the times."""
    absolute = "ordinary" in steps[0]
    lines = ["# What TrAct costs", "", head, "", "## Time", ""]
    lines += [
        "Added to forward and backward of the ordinary model: median over rounds of the ratio of "
        "the whole steps ± its uncertainty at 95% (quartiles of the rounds)"
        + (f", {_CLOCK}" if OWN in steps[0] else "")
        + ".",
        "",
        *_rows(steps),
        *(line for note in notes for line in ("", note)),
    ]
    if memory is not None:
        kind = "as torch allocated it" if absolute else "resident memory of a process"
        lines += ["", "## Memory", "", "Added to the ordinary peak of a 7 × 7 stem of stride 2, "]
        lines[-1] += f"alone, at 224 × 224 pixels; {kind}."
        lines += ["", *_rows(memory)]
    return "\n".join(lines) + "\n"


def _rows(table: Table) -> Iterator[str]:
    heading, *lines = table
    yield f"| {' | '.join(heading)} |"
    yield "|---" + "|--:" * (len(heading) - 1) + "|"
    for line in lines:
        yield f"| {' | '.join(line)} |"
