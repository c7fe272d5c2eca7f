"""Run somebody's script in this process, as the interpreter would have run it."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from tract_hub.errors import ScriptError


def run_script(name: str, arguments: Sequence[str], as_module: bool = False) -> None:
    """Run a script as ``python name arguments`` would, or a module as ``python -m name`` would.

    ``__main__`` is the script's, ``sys.argv`` and the first entry of ``sys.path`` too; they stay
    changed. What the script raises, ``SystemExit`` included, is passed on.

    Raises:
        ScriptError: there is no such script or module, or the folder has no ``__main__``.

    """
    if as_module:
        _first_on_path(Path.cwd())
        if not _module_exists(name):
            raise ScriptError(
                f"there is no module {name}: pass a name as python -m takes it, in the same folder"
            )
        sys.argv = [name, *arguments]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    if not Path(name).exists():
        raise ScriptError(
            f"there is no script {name}: pass its path, and options of its own only after it"
        )
    if Path(name).is_dir() and not (Path(name) / "__main__.py").exists():
        raise ScriptError(f"there is no __main__.py in the folder {name}: pass a script in it")
    if Path(name).is_file():
        _first_on_path(Path(name).resolve().parent)
    sys.argv = [name, *arguments]
    runpy.run_path(name, run_name="__main__")


def _first_on_path(folder: Path) -> None:
    """Replace what this program's own start put there, where the interpreter puts anything."""
    if not getattr(sys.flags, "safe_path", False):  # Python 3.10 has no such flag
        sys.path[0] = str(folder)


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it
        return False
