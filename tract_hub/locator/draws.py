"""Random numbers for a forward that is only followed, without a draw from anybody's generator."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, MethodType
from typing import Any

from torch import nn

_lock = threading.Lock()
_followed: dict[int, dict[type, Any]] = {}  # thread → its own generators, by their class
_replaced: list[tuple[dict[str, Any], str, Any]] = []  # names, name, what it stood for


@contextmanager
def own_draws(model: nn.Module) -> Iterator[None]:
    """Let this thread draw Python's and NumPy's numbers from generators of its own.

    The functions of ``random`` and ``numpy.random`` are methods of one generator for the whole
    process. To put its state back afterwards would take back what other threads drew meanwhile, so
    each function is led to another generator in this thread alone, as long as a thread is here.
    torch's numbers are looked after in ``values``.

    Args:
        model: the functions are also looked for among the names of the files of its modules.

    """
    thread = threading.get_ident()
    with _lock:
        if not _followed:
            _replace({type(module).__module__ for module in model.modules()})
        _followed[thread] = {}
    try:
        yield
    finally:
        with _lock:
            del _followed[thread]
            while _replaced and not _followed:
                names, name, original = _replaced.pop()
                names[name] = original


def _replace(files: set[str]) -> None:
    generators: list[Any] = [getattr(random.random, "__self__", None)]
    if "numpy.random" in sys.modules:
        generators.append(sys.modules["numpy.random"].rand.__self__)
    for file in {"random", "numpy.random", *files}:
        names = getattr(sys.modules.get(file), "__dict__", {})
        for name, value in list(names.items()):
            bound = isinstance(value, (BuiltinFunctionType, MethodType)) and value.__self__
            if any(bound is generator for generator in generators):
                _replaced.append((names, name, value))
                names[name] = _led(value)


def _led(function: Any) -> Callable[..., Any]:
    kind = type(function.__self__)

    def draw(*args: Any, **kwargs: Any) -> Any:
        own = _followed.get(threading.get_ident())
        if own is None:
            return function(*args, **kwargs)
        generator = own.setdefault(kind, kind(0))
        return getattr(generator, function.__name__)(*args, **kwargs)

    return draw
