"""The console command ``tract-hub``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NoReturn

import tract_hub
from tract_hub.errors import TractError
from tract_hub.names import did_you_mean

ABOUT = """usage: tract-hub [--version] {compare,inspect,audit,bench} …

  compare   train with and without TrAct: does it help, how much, how sure
  inspect   the first layers of a model, and what TrAct costs there
  audit     the first layers of every model of a zoo
  bench     time and memory of a training step

tract-hub COMMAND --help shows every option and its default."""
COMMANDS = ("compare", "inspect", "audit", "bench")
"""A module of this name in ``tract_hub.studies`` has a function of this name; its settings are the
class of this name, with a capital, in ``tract_hub.studies.settings``."""
RESUMED = ("compare", "audit")
BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: list[str] | None = None) -> None:
    """Run ``tract-hub`` and exit: 0 done, 2 bad input, 130 interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(ABOUT)
        sys.exit(0 if words else BAD_INPUT)
    if words[0] == "--version":
        print(f"tract-hub {tract_hub.__version__}")
        sys.exit(0)
    command = words[0]
    if command not in COMMANDS:
        _fail(f"there is no command {command!r}; {did_you_mean(command, COMMANDS)}")
    try:
        _run(command, words[1:])
    except TractError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tract_hub"):
            raise
        _fail(f"this needs the package {error.name}: install tract-hub with its extra studies")
    except KeyboardInterrupt:
        again = "; the same command again goes on from there" if command in RESUMED else ""
        _fail(f"interrupted{again}", INTERRUPTED)
    sys.exit(0)


def _run(command: str, words: list[str]) -> None:
    """Run a command; tyro says what is wrong with its words, and exits by 2."""
    import tyro

    from tract_hub.studies import settings

    options: dict[str, Any] = {"prog": f"tract-hub {command}", "args": words}
    if command == "compare":
        options["default"] = settings.recipe_of(words)
    given = tyro.cli(getattr(settings, command.capitalize()), use_underscores=False, **options)
    getattr(importlib.import_module(f"tract_hub.studies.{command}"), command)(given)


def _fail(message: str, status: int = BAD_INPUT) -> NoReturn:
    """Print one line, from one process of a launcher's many, and exit."""
    if os.environ.get("RANK", "0") == "0":
        print("tract-hub: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(status)
