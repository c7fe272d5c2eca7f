"""Steps of several trainings, timed in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[], object]
Turn = dict[str, float]
"""Seconds of a step, by the name of the training."""
LEAST_TURNS = 3
MOST_TURNS = 200
"""Turns after which the notch of the median no longer narrows by anything that is shown."""
GPU_STEPS = 5
"""Steps between two looks at the clock: training looks at a GPU now and then only."""


def take_turns(
    steps: Mapping[str, Step],
    device: torch.device,
    budget: float = math.inf,
    most: int = MOST_TURNS,
    after_turn: Callable[[float], object] = lambda seconds: None,
) -> list[Turn]:
    """Time steps until a budget in seconds is spent, or for so many turns.

    The order is backwards in every second turn, so that a change in the machine's load meets all.
    """
    turns: list[Turn] = []
    began = time.perf_counter()
    while len(turns) < most:
        order = list(steps) if len(turns) % 2 == 0 else list(steps)[::-1]
        turns.append({name: seconds(steps[name], device) for name in order})
        after_turn(sum(turns[-1].values()))
        with_another = (time.perf_counter() - began) * (1 + 1 / len(turns))
        if len(turns) >= LEAST_TURNS and with_another > budget:
            break
    return turns


def ratios(turns: list[Turn], name: str, base: str = "ordinary") -> list[float]:
    """Return a training's seconds over those of another, turn by turn."""
    return [turn[name] / turn[base] for turn in turns]


def seconds(step: Step, device: torch.device) -> float:
    """Return the seconds of a step; on a GPU, of several in a row."""
    steps, began = 1 if device.type == "cpu" else GPU_STEPS, clock(device)
    for _ in range(steps):
        step()
    return (clock(device) - began) / steps


def clock(device: torch.device) -> float:
    """Wait for the device; return the time in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def added(quartiles: list[float]) -> str:
    """Write quartiles of ratios as what is added: ``"+3.1 % (+2.9 to +3.4)"``."""
    low, middle, high = (f"{100 * (ratio - 1):+.1f}" for ratio in quartiles)
    return f"{middle} % ({low} to {high})"
