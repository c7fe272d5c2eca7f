"""Run an unmodified training script with TrAct on the models that it trains on images.

    python -m tract_hub.launch [options] script.py arguments…
    accelerate launch … -m tract_hub.launch [options] script.py arguments…
    torchrun … -m tract_hub.launch [options] script.py arguments…

When the script ends, one line on stderr says which models got TrAct, and how many optimizer steps
used it. A step used it if a forward in training mode applied it before. The exit status is the
script's own if that is not 0, 2 if the command is wrong, and 3 if no step used TrAct.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, get_args

from tract_hub.config import Damping, Scope, Settings
from tract_hub.integrations.script import UNUSED, ScriptWatch, run_script


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a script with TrAct, and exit.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    """
    options, settings = _parsed(arguments)
    watch = ScriptWatch(settings, options.model)
    status: Any = None
    try:
        with watch.watching():
            run_script(options.script, options.arguments, options.module)
    except SystemExit as end:
        status = end.code
    finally:
        if os.environ.get("RANK", "0") == "0":  # one line from a launcher's many processes
            print("tract_hub.launch:", *str(watch).split(), file=sys.stderr, flush=True)
    used = any(training.used for training in watch.trainings.values())
    raise SystemExit(status or (0 if used else UNUSED))


def _parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(
        prog="tract_hub.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--lam", type=float, help="damping λ (default: 0.1)")
    add("--scope", choices=get_args(Scope), help="whose rows the Gram matrix is taken over")
    add("--damping", choices=get_args(Damping), help="whether λ is relative to the mean square")
    add("--model", metavar="NAME", help="the one to treat: class, variable, or module inside")
    add("-m", "--module", action="store_true", help="the script is a module's name")
    add("script")
    add("arguments", nargs=argparse.REMAINDER, help="of the script").required = False
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("lam", "scope", "damping")}
    settings = {name: value for name, value in given.items() if value is not None}
    try:
        Settings(**settings)
    except ValueError as error:
        parser.error(str(error))
    if not (options.module or Path(options.script).exists()):
        parser.error(f"there is no script {options.script}; its own options stand after it")
    return options, settings


if __name__ == "__main__":
    main()
