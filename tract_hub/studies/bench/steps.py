"""The time that a training step takes in every arm, side by side."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar
from unittest import mock

from tract_hub.method import gate, interception
from tract_hub.studies.bench.arms import ARMS, Setup, Stepper
from tract_hub.studies.bench.cases import Case
from tract_hub.studies.interleaved import Ratio, interleave, ratio

WARM_UPS = 3
FEWEST, MOST = 7, 400
Result = dict[str, Any]
Made = TypeVar("Made")


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
    results: dict[str, Result] = {}
    # All are made before any steps: enable makes the compiler forget what it compiled before.
    ordinary, *others = ARMS
    steppers = {ordinary: Stepper(case, ordinary, setup)}
    twin = partial(Stepper, case, setup=setup, ordinary=steppers[ordinary])
    steppers |= _trying(others, twin, results)
    warm = dict(_trying(steppers, lambda arm: _warm_up(steppers[arm]), results))
    steppers = {arm: steppers[arm] for arm in warm}
    one_round = setup.steps * sum(warm.values())
    count = min(MOST, max(FEWEST, int(budget / one_round)))
    with _undisturbed(), _clocked(setup) as spent:
        rounds = interleave([stepper.seconds for stepper in steppers.values()], count)
    columns = list(zip(*rounds, strict=True))
    for arm, times in zip(steppers, columns, strict=True):
        shares = {"ratio": ratio(times, columns[0]), "rounds": count}
        results[arm] = {"seconds": Ratio.of(times).median, **shares}
    results["tract_hub"]["own"] = sum(spent) / sum(columns[0]) if spent else None
    return {arm: results[arm] for arm in ARMS}


def _trying(
    arms: Iterable[str], make: Callable[[str], Made], results: dict[str, Result]
) -> Iterator[tuple[str, Made]]:
    """Make something of each arm; note why not, as torch_tract stops at what it does not know."""
    for arm in arms:
        try:
            yield arm, make(arm)
        except Exception as error:
            if arm != "torch_tract":
                raise
            results[arm] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def _warm_up(stepper: Stepper) -> float:
    return min(stepper.seconds() for _ in range(WARM_UPS))


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
