"""``tract-hub bench``: measure, and write the results."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tract_hub.errors import SettingsError
from tract_hub.studies.bench.arms import Setup
from tract_hub.studies.bench.cases import Case, chosen
from tract_hub.studies.bench.memory import peak_memory
from tract_hub.studies.bench.report import markdown, memory_table, steps_table
from tract_hub.studies.bench.steps import time_case
from tract_hub.studies.files import make_folder, write_atomically
from tract_hub.studies.machine import check_there, device_name, in_words, versions


def bench(
    cases: str,
    device: str,
    budget: float,
    threads: int,
    memory: bool,
    out: Path,
    forms: Mapping[str, bool],
) -> None:
    """Measure cases, print what TrAct adds, and write ``bench.json`` and ``bench.md``.

    Args:
        cases: names, separated by commas; none for all.
        device: a torch device.
        budget: seconds for one case, about.
        threads: of the CPU.
        memory: whether to measure peak memory too, which is done on a CPU only.
        out: folder of the results.
        forms: of the training step, as ``Setup`` has them.

    Raises:
        SettingsError: there is no such device or case, or memory cannot be measured here.

    """
    check_there(device)
    torch.set_num_threads(threads)
    setup = Setup(torch.device(device), **forms)
    if memory and setup.device.type == "cpu" and not Path("/proc/self/status").exists():
        raise SettingsError("peak memory is measured on Linux only: add --no-memory")
    make_folder(out)  # before minutes of measuring
    timed = _timed(chosen(setup.device.type, cases), setup, budget)
    peaks = peak_memory() if memory and setup.device.type == "cpu" else None
    steps, peak_table = steps_table(timed), None if peaks is None else memory_table(peaks)
    for title, table in (("added time", steps), ("added peak memory", peak_table)):
        if table is not None:
            Console().print(_shown(title, table))
    facts = {"device": device_name(setup.device), "threads": threads, "versions": versions()}
    result = {**facts, **forms, "cases": timed, "peak_mib": peaks}
    write_atomically(out / "bench.json", json.dumps(result, indent=1, default=_plain) + "\n")
    write_atomically(out / "bench.md", markdown(_head(facts, forms), steps, peak_table))


def _timed(cases: dict[str, Case], setup: Setup, budget: float) -> dict[str, Any]:
    console = Console(stderr=True)
    results = {}
    for name, case in track(cases.items(), "bench", console=console):
        results[name] = time_case(case, setup, budget)
        gc.collect()  # a compiled model refers to itself, and would stay in memory
    return results


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value)


def _head(facts: Mapping[str, Any], forms: Mapping[str, bool]) -> str:
    kinds = [name for name, on in forms.items() if on] or ["float32", "eager"]
    packages = in_words(facts["versions"])
    threads = "one thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return f"{facts['device']}, {threads}; {', '.join(kinds)}; photographs; {packages}."


def _shown(title: str, lines: list[list[str]]) -> Table:
    table = Table(*lines[0], title=title)
    for line in lines[1:]:
        table.add_row(*line)
    return table
