"""The options of ``tract-hub audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def audit(
    zoo: Annotated[str, typer.Argument(help="timm, huggingface or torchvision.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(
        "tract-hub-runs/audit"
    ),
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    time_limit: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds a model.")
    ] = 120.0,
    only: Annotated[str, typer.Option(help="Names, such as 'vit_*'.")] = "*",
) -> None:
    """Find the first layers of every model of a zoo, and write a table and JSON.

    An audit that was interrupted goes on where it stopped.
    """
    from tract_hub.studies.audit.run import audit as run

    run(zoo, out, jobs, time_limit, only)
