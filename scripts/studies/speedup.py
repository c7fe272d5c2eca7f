"""What TrAct gained over ordinary training, with confidence intervals over paired seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student
from trainings import Run, Trained

from tract_hub.studies.compare.aggregate import first_epoch_at_least

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; without one from a single value."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies on one side of zero, else 0."""
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Line:
    """One arm of one part.

    Args:
        part: the part's name.
        published: the length in the paper that it stands for, in epochs.
        epochs: that were trained.
        lam: None is ordinary training.
        accuracies: final ones on the test images, by seed; diverged seeds left out.
        diverged: how many seeds.
        gain: final accuracy less that of the ordinary run of the same seed.
        over_reference: the same, less the ordinary run of the reference part.
        reached: how many seeds reached the final accuracy of the ordinary run of the same seed.
        epoch_ratio: first epoch at which they did, over the first at which the ordinary run itself
            was as good; geometric mean; None unless all seeds reached it.
        time_ratio: the same in wall time: times the ratio of the times of a step.

    """

    part: str
    published: int
    epochs: int
    lam: float | None
    accuracies: tuple[float, ...]
    diverged: int
    gain: Interval | None
    over_reference: Interval | None
    reached: int
    epoch_ratio: Interval | None
    time_ratio: Interval | None

    @property
    def verdict(self) -> str:
        """What the seeds show, in words."""
        if self.lam is None or self.gain is None or math.isnan(self.gain.low):
            return ""
        return {1: "better", 0: "no difference shown", -1: "worse"}[self.gain.sign]


@dataclass(frozen=True)
class Shorter:
    """TrAct on a shorter schedule against ordinary training on a longer one, of the same part."""

    part: str
    lam: float
    epochs: int
    ordinary_epochs: int
    gain: Interval


def interval(values: Sequence[float]) -> Interval:
    """Return mean and Student's interval of values that are a seed each."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean)
    reach = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    half = float(reach) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def ratio_interval(values: Sequence[float]) -> Interval:
    """Return the geometric mean of ratios, and its interval on a logarithmic scale."""
    logs = interval([math.log(value) for value in values])
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))


def lines_of(trained: Sequence[Trained], against: str | None) -> list[Line]:
    """Return one line for every part, length and arm.

    Args:
        trained: all parts.
        against: the reference part's name, or None.

    """
    lines = []
    for part in trained:
        ordinary = finished(part.runs, None)
        reference = next(
            (finished(other.runs, None) for other in trained
             if other.part.name == against and other.part.published == part.part.published),
            {},
        )  # fmt: skip
        for lam in (None, *part.part.lams):
            lines.append(_line(part, lam, ordinary, reference))
    return lines


def finished(runs: Sequence[Run], lam: float | None) -> dict[int, Run]:
    """Return an arm's runs that did not diverge, by seed."""
    return {run.seed: run for run in runs if run.lam == lam and not run.diverged}


def _line(
    trained: Trained, lam: float | None, ordinary: dict[int, Run], reference: dict[int, Run]
) -> Line:
    part, runs = trained.part, finished(trained.runs, lam)
    ratios = [] if lam is None else _epoch_ratios(runs, ordinary)
    reached = [ratio for ratio in ratios if ratio is not None]
    whole = ratio_interval(reached) if reached and len(reached) == len(part.seeds) else None
    step = trained.step_ratios.get(lam, 1.0) if lam is not None else 1.0
    return Line(
        part.name,
        part.published,
        part.epochs,
        lam,
        tuple(run.accuracies[-1] for run in runs.values()),
        len(part.seeds) - len(runs),
        None if lam is None else _gain(runs, ordinary),
        _gain(runs, reference),
        len(reached),
        whole,
        Interval(whole.mean * step, whole.low * step, whole.high * step) if whole else None,
    )


def _gain(runs: dict[int, Run], others: dict[int, Run]) -> Interval | None:
    pairs = [(run, others[seed]) for seed, run in runs.items() if seed in others]
    if not pairs:
        return None
    return interval([run.accuracies[-1] - other.accuracies[-1] for run, other in pairs])


def _epoch_ratios(runs: dict[int, Run], ordinary: dict[int, Run]) -> list[float | None]:
    """Return by seed the epochs to the ordinary final accuracy, over the ordinary run's own."""
    ratios = []
    for seed, run in runs.items():
        if seed in ordinary:
            goal = ordinary[seed].accuracies[-1]
            mine, own = (first_epoch_at_least(r.accuracies, goal) for r in (run, ordinary[seed]))
            ratios.append(mine / own if mine and own else None)
    return ratios


def shorter_schedules(trained: Sequence[Trained]) -> list[Shorter]:
    """Return TrAct on every shorter schedule against ordinary training on each longer one."""
    found = []
    for short in trained:
        for long in trained:
            if short.part.name == long.part.name and short.part.epochs < long.part.epochs:
                for lam in short.part.lams:
                    gain = _gain(finished(short.runs, lam), finished(long.runs, None))
                    if gain is not None:
                        epochs = (short.part.epochs, long.part.epochs)
                        found.append(Shorter(short.part.name, lam, *epochs, gain))
    return found
