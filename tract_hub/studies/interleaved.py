"""Times of several things measured in turns, so that a change in the machine's load meets all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """A median, and the quartiles around it."""

    median: float
    first: float
    third: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """Summarise at least two values."""
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, first, third)


def interleave(timers: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Call all timers in every round, in the reverse order in every second one.

    Args:
        timers: each does its work once and returns the seconds.
        rounds: how often.

    Returns:
        One list a round, in the order of the timers.

    """
    return [_round(timers, backwards=i % 2 == 1) for i in range(rounds)]


def _round(timers: Sequence[Callable[[], float]], backwards: bool) -> list[float]:
    times = [0.0] * len(timers)
    order = list(enumerate(timers))
    for i, timer in reversed(order) if backwards else order:
        times[i] = timer()
    return times


def thread_seconds(work: Callable[[], object]) -> Callable[[], float]:
    """Return a timer of the CPU time that the calling thread spends on some work."""

    def timer() -> float:
        began = time.thread_time()
        work()
        return time.thread_time() - began

    return timer


def ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Divide times by those of the same rounds."""
    return Ratio.of([a / b for a, b in zip(times, reference, strict=True)])
