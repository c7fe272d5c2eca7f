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
from tract_hub.integrations.script import ScriptWatch, TrainedModel, run_script

UNUSED = 3
SETTINGS = ("lam", "scope", "damping")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a script with TrAct, and exit.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    """
    options, settings = _parsed(arguments)
    watch = ScriptWatch(settings, options.model)
    try:
        with watch:
            run_script(options.script, options.arguments, options.module)
    except BaseException as error:
        ended_well = isinstance(error, SystemExit) and not error.code
        if not (ended_well or watch.failure):
            if watch.treated:
                _say(_summary(watch))
            raise
    _say(_summary(watch))
    used = watch.failure is None and any(model.used for model in watch.treated)
    raise SystemExit(0 if used else UNUSED)


def _parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(
        prog="tract_hub.launch",
        description="Run an unmodified training script with TrAct on the models that it trains.",
        epilog="Exit status: the script's own where that is not 0; 2 where the command is wrong; "
        "3 where no optimizer step used TrAct.",
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
    settings = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    try:
        Settings(**settings)
    except ValueError as error:
        parser.error(str(error))
    if not (options.module or Path(options.script).exists()):
        parser.error(f"there is no script {options.script}; its own options stand after it")
    return options, settings


def _summary(watch: ScriptWatch) -> str:
    if watch.failure or not watch.treated:
        return f"TrAct was not used: {watch.why_none()}"
    groups: dict[Any, list[TrainedModel]] = {}  # models trained one after the other, as in folds
    for model in watch.treated:
        groups.setdefault((model.name, model.stems), []).append(model)
    left = [f"not on {name}: {why}" for name, why in watch.left.items()]
    return "; ".join([*map(_sentence, groups.values()), *left])


def _sentence(models: list[TrainedModel]) -> str:
    stems = models[0].stems
    names = ", ".join(stem.weight_name for stem in stems)
    damping = "relative " if stems[0].damping == "relative" else ""
    scope = ", scope global," if stems[0].scope == "global" else ""
    count = f"{len(models)} × " if len(models) > 1 else ""
    used, steps = sum(model.used for model in models), sum(model.steps for model in models)
    return (
        f"TrAct {damping}λ={stems[0].lam:g}{scope} on {names} of {count}{models[0].name}: "
        f"{used} of {steps} optimizer steps used it"
    )


def _say(message: str) -> None:
    """Print one line, from one process of a launcher's many."""
    if os.environ.get("RANK", "0") == "0":
        print("tract_hub.launch: " + " ".join(message.split()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
