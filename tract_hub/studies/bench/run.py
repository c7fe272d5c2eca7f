"""``tract-hub bench``: measure, and write the results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tract_hub.errors import SettingsError
from tract_hub.studies.bench.arms import Setup
from tract_hub.studies.bench.cases import Case, chosen
from tract_hub.studies.bench.memory import peak_memory
from tract_hub.studies.bench.report import markdown, memory_table, steps_table
from tract_hub.studies.bench.steps import time_case
from tract_hub.studies.compare.devices import check_there
from tract_hub.studies.compare.identity import device_name, versions
from tract_hub.studies.files import make_folder, write_atomically


def bench(
    cases: Annotated[str, typer.Option(help="Names of cases, separated by commas; else all.")] = "",
    device: Annotated[str, typer.Option(help="cpu, or a GPU such as cuda.")] = "cpu",
    budget: Annotated[float, typer.Option(min=0, help="Seconds for one case, about.")] = 60.0,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of the CPU.")] = 1,
    bf16: Annotated[bool, typer.Option(help="Train under autocast to bfloat16.")] = False,
    compiled: Annotated[bool, typer.Option(help="Compile the models.")] = False,
    channels_last: Annotated[bool, typer.Option(help="Lay images out channels last.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too (CPU, Linux).")] = True,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(
        "tract-hub-runs/bench"
    ),
) -> None:
    """Measure what TrAct adds to a training step, beside the ordinary model and torch_tract.

    The latter is measured where it is installed (the extra named bench does that).
    """
    check_there(device)
    torch.set_num_threads(threads)
    setup = Setup(torch.device(device), bf16, compiled, channels_last)
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
    settings = {"bf16": bf16, "compiled": compiled, "channels_last": channels_last}
    result = facts | settings | {"cases": timed, "peak_mib": peaks}
    write_atomically(out / "bench.json", json.dumps(result, indent=1, default=_plain) + "\n")
    write_atomically(out / "bench.md", markdown(_head(facts, settings), steps, peak_table))


def _timed(cases: dict[str, Case], setup: Setup, budget: float) -> dict[str, Any]:
    console = Console(stderr=True)
    return {
        name: time_case(case, setup, budget)
        for name, case in track(cases.items(), "bench", console=console)
    }


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value)


def _head(facts: dict[str, Any], settings: dict[str, bool]) -> str:
    kinds = [name for name, on in settings.items() if on] or ["float32", "eager"]
    found = {name: at for name, at in facts["versions"].items() if at != "not installed"}
    packages = ", ".join(f"{name} {version}" for name, version in found.items())
    threads = "one thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return f"{facts['device']}, {threads}; {', '.join(kinds)}; photographs; {packages}."


def _shown(title: str, lines: list[list[str]]) -> Table:
    table = Table(*lines[0], title=title)
    for line in lines[1:]:
        table.add_row(*line)
    return table
