"""``tract-hub bench``: measure, and write the results."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.table
import torch
from rich.console import Console
from rich.progress import track

from tract_hub.errors import SettingsError
from tract_hub.studies.bench.arms import Setup
from tract_hub.studies.bench.cases import chosen
from tract_hub.studies.bench.memory import peak_memory, peak_memory_of_gpu
from tract_hub.studies.bench.report import Table, failures, markdown, memory_table, steps_table
from tract_hub.studies.bench.steps import time_case
from tract_hub.studies.files import make_folder, write_atomically, written
from tract_hub.studies.machine import check_there, device_name, in_words, versions

FORMS = tuple(field.name for field in dataclasses.fields(Setup) if field.name != "device")


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
        memory: whether to measure peak memory too, on a CPU or a CUDA device.
        out: folder of the results.
        forms: of the training step, as ``Setup`` has them.

    Raises:
        SettingsError: there is no such device or case, or memory cannot be measured here.

    """
    check_there(device)
    setup = Setup(torch.device(device), **forms)
    on_cpu = setup.device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(threads)
    if memory and on_cpu and not Path("/proc/self/status").exists():
        raise SettingsError("peak memory is measured on Linux only: add --no-memory")
    make_folder(out)  # before minutes of measuring
    results: dict[str, Any] = {
        "device": device_name(setup.device),
        "threads": threads if on_cpu else None,
        "versions": versions(),
        **forms,
        "cases": {},
        "peak_mib": None,
    }
    wanted = chosen(setup.device.type, cases)
    for name, case in track(wanted.items(), "bench", console=Console(stderr=True)):
        results["cases"][name] = time_case(case, setup, budget)
        gc.collect()  # a compiled model refers to itself, and would stay in memory
        _write(results, out)  # what was measured is kept, whatever becomes of the rest
    results["peak_mib"] = _peaks(setup) if memory else None
    for title, table in _write(results, out).items():
        Console().print(_shown(title, table))
    print(written(out, "bench.md", "bench.json"))


def _write(results: dict[str, Any], out: Path) -> dict[str, Table]:
    """Write the results so far; return their tables by title."""
    steps = steps_table(results["cases"], absolute=results["threads"] is None)
    peaks = results["peak_mib"]
    memory = None if peaks is None else memory_table(peaks)
    write_atomically(out / "bench.json", json.dumps(results, indent=1, default=_plain) + "\n")
    report = markdown(_head(results), steps, memory, failures(results["cases"]))
    write_atomically(out / "bench.md", report)
    tables = {"added time": steps, "added peak memory": memory}
    return {title: table for title, table in tables.items() if table is not None}


def _peaks(setup: Setup) -> dict[str, dict[int, float]] | None:
    if setup.device.type == "cuda":
        return peak_memory_of_gpu(setup)
    return peak_memory() if setup.device.type == "cpu" else None


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value)


def _head(results: Mapping[str, Any]) -> str:
    kinds = [name for name in FORMS if results[name]] or ["float32", "eager"]
    threads = results["threads"]
    cores = {None: "", 1: ", one thread"}.get(threads, f", {threads} threads")
    packages = in_words(results["versions"])
    return f"{results['device']}{cores}; {', '.join(kinds)}; photographs; {packages}."


def _shown(title: str, lines: Table) -> rich.table.Table:
    table = rich.table.Table(*lines[0], title=title)
    for line in lines[1:]:
        table.add_row(*line)
    return table
