"""The options of ``tract-hub inspect``."""

from __future__ import annotations

from typing import Annotated

import typer


def inspect(
    model: Annotated[
        str, typer.Argument(help="A timm name, torchvision:NAME, or a Transformers type or folder.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the first layers of a model, and what TrAct would cost there. Needs no weights."""
    from tract_hub.studies.inspect import inspect as run

    run(model, as_json)
