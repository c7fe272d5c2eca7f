"""The options of ``tract-hub bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

FORM = "How the steps are run"


def _flag(name: str, text: str) -> Any:
    return typer.Option(name, help=text, rich_help_panel=FORM)


def bench(
    cases: Annotated[str, typer.Option(help="Their names, as a,b; else all.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    budget: Annotated[float, typer.Option(min=0, help="Seconds for a case.")] = 60.0,
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Time alone, no peak memory.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(
        "tract-hub-runs/bench"
    ),
    threads: Annotated[
        int, typer.Option(min=1, max=1024, help="Of the CPU.", rich_help_panel=FORM)
    ] = 1,
    bf16: Annotated[bool, _flag("--bf16", "Autocast to bfloat16.")] = False,
    compiled: Annotated[bool, _flag("--compiled", "By torch.compile.")] = False,
    channels_last: Annotated[bool, _flag("--channels-last", "Layout of the images.")] = False,
) -> None:
    """Measure what TrAct adds to a training step, and what torch_tract does, where installed."""
    from tract_hub.studies.bench.run import bench as run

    forms = {"bf16": bf16, "compiled": compiled, "channels_last": channels_last}
    run(cases, device, budget, threads, not no_memory, out, forms)
