"""The time that a training step takes in every arm, side by side."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from tract_hub.method import gate, interception
from tract_hub.studies.bench.arms import ARMS, Setup, Stepper
from tract_hub.studies.bench.cases import Case
from tract_hub.studies.interleaved import Ratio, interleave, ratio

WARM_UPS = 3
FEWEST, MOST = 7, 400
Result = dict[str, Any]


def time_case(case: Case, setup: Setup, budget: float) -> dict[str, Result]:
    """Measure forward and backward of one case in every arm that can run it.

    The arms take turns step by step in one process, every second round in the reverse order. They
    share weights and images, and the garbage collector does not look at what was there before.

    Args:
        case: the model and its batch.
        setup: how to step.
        budget: seconds to spend, about.

    Returns:
        For each arm: ``error``, a line, or ``seconds``, the median; ``ratio`` to the ordinary step
        with its quartiles; ``rounds``, their number; and, for tract_hub, ``own``, the time in the
        Gram matrix and the solve as a share of the ordinary step, None where no clock can be put
        around them.

    """
    steppers: dict[str, Stepper] = {}
    results: dict[str, Result] = {}
    slowest = 0.0
    for arm in ARMS:
        try:
            stepper = Stepper(case, arm, setup, steppers.get("ordinary"))
            slowest += min(stepper.seconds() for _ in range(WARM_UPS))
            steppers[arm] = stepper
        except Exception as error:  # torch_tract stops at what it does not know
            if arm != "torch_tract":
                raise
            results[arm] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    count = min(MOST, max(FEWEST, int(budget / slowest)))
    with _undisturbed(), _clocked(setup) as spent:
        rounds = interleave([stepper.seconds for stepper in steppers.values()], count)
    columns = list(zip(*rounds, strict=True))
    for arm, times in zip(steppers, columns, strict=True):
        shares = {"ratio": ratio(times, columns[0]), "rounds": count}
        results[arm] = {"seconds": Ratio.of(times).median, **shares}
    results["tract_hub"]["own"] = sum(spent) / sum(columns[0]) if spent else None
    return {arm: results[arm] for arm in ARMS}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the garbage collector from walking, in some step, over all that was imported."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _clocked(setup: Setup) -> Iterator[list[float]]:
    """Note the seconds that each Gram matrix and each solve takes, where they are plain calls."""
    spent: list[float] = []

    def timed(function: Any) -> Any:
        def call(*args: Any) -> Any:
            began = time.perf_counter()
            result = function(*args)
            spent.append(time.perf_counter() - began)
            return result

        return call

    with ExitStack() as stack:
        if setup.device.type == "cpu" and not setup.compiled:
            for module, name in ((interception, "gram_of"), (gate, "divide_by_gram")):
                patched = mock.patch.object(module, name, timed(getattr(module, name)))
                stack.enter_context(patched)
        yield spent
