"""The console command ``tract-hub``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NoReturn

from tract_hub.errors import TractError

ABOUT = "The exact TrAct gradient for the first layer of any vision model."
# To add a command: a module of this name in tract_hub/commands with a function of this name; its
# CONTEXT, where it has one, is click's.
COMMANDS = ("inspect", "compare", "audit", "bench", "launch")
RESUMED = ("compare", "audit")
"""Commands that keep what is done, and go on from there."""
BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: list[str] | None = None) -> None:
    """Run ``tract-hub`` and exit: 0 done, 2 bad input, 130 interrupted.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    """
    try:
        app = _app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        _fail("the tract-hub command needs more packages: pip install 'tract-hub[studies]'")
    sys.exit(_run(app, sys.argv[1:] if arguments is None else arguments))


def _app() -> Any:
    import typer

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    # Without a callback, typer turns a single command into the whole program.
    app.callback(help=ABOUT)(_callback)
    for name in COMMANDS:
        module = importlib.import_module(f"tract_hub.commands.{name}")
        app.command(name, context_settings=getattr(module, "CONTEXT", None))(getattr(module, name))
    return app


def _callback() -> None:
    """Do nothing before a command."""


def _run(app: Any, arguments: list[str]) -> int:
    try:
        status = int(app(arguments, standalone_mode=False, prog_name="tract-hub") or 0)
    except TractError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tract_hub"):
            raise
        _fail(f"this needs the package {error.name}: pip install 'tract-hub[studies]'")
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():  # no command: the help was printed
            return BAD_INPUT
        _fail(f"{error.format_message()} (tract-hub --help lists what there is)")
    # typer turns Ctrl-C into this status.
    if status == INTERRUPTED:
        resumed = arguments[0] in RESUMED
        hint = "; the same command again goes on from what is done" if resumed else ""
        _fail(f"interrupted{hint}", status)
    return status


def _fail(message: str, status: int = BAD_INPUT) -> NoReturn:
    """Print one line, from one process of a launcher's many, and exit."""
    if os.environ.get("RANK", "0") == "0":
        print("tract-hub: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
