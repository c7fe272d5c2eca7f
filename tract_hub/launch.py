"""Run an unmodified training script with TrAct on the model that it trains.

    python -m tract_hub.launch [options] script.py arguments…
    accelerate launch … -m tract_hub.launch [options] script.py arguments…
    torchrun … -m tract_hub.launch [options] script.py arguments…

When the script ends, one line on stderr says what was enabled and how many optimizer steps used
it: those before which a forward in training mode applied TrAct. The exit status is the script's
own where that is not 0; 2 where the command is wrong; 3 where no step used TrAct.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn, get_args

from tract_hub.config import Scope, TractConfig
from tract_hub.errors import ScriptError
from tract_hub.integrations.scripts.script import run_script
from tract_hub.integrations.scripts.watch import Trained, Watch

BAD_INPUT, UNUSED = 2, 3
SETTINGS = ("lam", "scope")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a script with TrAct, and exit.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    """
    options = _parser().parse_args(arguments)
    watch = _watch(options)
    try:
        with watch:
            run_script(options.script, options.arguments, options.module)
    except ScriptError as error:
        _say(str(error))
        raise SystemExit(BAD_INPUT) from None
    except BaseException as error:
        ended_well = isinstance(error, SystemExit) and not error.code
        if not (ended_well or watch.failure):
            if watch.trained:
                _say(_summary(watch))
            raise
    _say(_summary(watch))
    used = watch.failure is None and any(model.used for model in watch.trained)
    raise SystemExit(0 if used else UNUSED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tract_hub.launch",
        description="Run an unmodified training script with TrAct on the model that it trains.",
        epilog="Exit status: the script's own where that is not 0; 2 where the command is wrong; "
        "3 where no optimizer step used TrAct.",
        allow_abbrev=False,
    )
    parser.add_argument("--lam", type=float, help="the damping λ (default: 0.1)")
    parser.add_argument(
        "--scope", choices=get_args(Scope), help="whose rows the Gram matrix takes (default: rank)"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="which model, where several are trained: the name of its variable in the script, of "
        "its class, or of a module inside it",
    )
    parser.add_argument("-m", "--module", action="store_true", help="the script is a module's name")
    parser.add_argument("script")
    arguments = parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    arguments.required = False  # or argparse asks for them where the script is missing
    return parser


def _watch(options: argparse.Namespace) -> Watch:
    try:
        given = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
        config = TractConfig(**given)
    except ValueError as error:
        _say(str(error))
        raise SystemExit(BAD_INPUT) from None
    return Watch(config, options.model, tuple(given))


def _summary(watch: Watch) -> str:
    if watch.failure:
        return str(watch.failure)
    if not watch.trained:
        return f"TrAct was not used: {watch.why_none()}"
    return "; ".join(_sentence(models) for models in _alike(watch.trained))


def _alike(trained: list[Trained]) -> list[list[Trained]]:
    """Put together the models of a loop that trains one after the other, as in folds."""
    groups: dict[object, list[Trained]] = {}
    for model in trained:
        groups.setdefault((model.name, model.stems), []).append(model)
    return list(groups.values())


def _sentence(models: list[Trained]) -> str:
    first, count = models[0], f"{len(models)} × " if len(models) > 1 else ""
    stems = ", ".join(stem.weight_name for stem in first.stems)
    scope = ", scope global," if first.stems[0].scope == "global" else ""
    used, steps = sum(m.used for m in models), sum(m.steps for m in models)
    return (
        f"TrAct λ={first.stems[0].lam:g}{scope} on {stems} of {count}{first.name}: "
        f"{used} of {steps} optimizer steps used it"
    )


def _say(message: str) -> None:
    """Print one line, from one process of a launcher's many."""
    if os.environ.get("RANK", "0") == "0":
        print("tract_hub.launch: " + " ".join(message.split()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
