"""``tract-hub launch``: the same as ``python -m tract_hub.launch``, which owns the options."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

CONTEXT = {
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}


def launch(
    arguments: Annotated[list[str] | None, typer.Argument(help="Options, script, its own.")] = None,
) -> None:
    """Run an unmodified training script with TrAct on the model that it trains."""
    # A process that knows nothing of typer: the script's exceptions and exit status are its own.
    os.execv(sys.executable, [sys.executable, "-m", "tract_hub.launch", *(arguments or [])])
