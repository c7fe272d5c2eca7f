"""The options of ``tract-hub bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    from tract_hub.studies.bench.run import bench as run

    forms = {"bf16": bf16, "compiled": compiled, "channels_last": channels_last}
    run(cases, device, budget, threads, memory, out, forms)
