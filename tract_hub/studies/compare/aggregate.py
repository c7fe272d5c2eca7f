"""From single runs to what an arm did on average, and how fast it got there."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tract_hub.errors import UnpairedRunsError
from tract_hub.studies.compare.records import ORDINARY, Arm, RunRecord


@dataclass(frozen=True)
class Curve:
    """A quantity by epoch.

    Args:
        mean: over seeds.
        spread: sample standard deviation over seeds; 0 for a single seed.

    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]


@dataclass(frozen=True)
class ArmSummary:
    """What one arm did.

    Args:
        arm: which.
        seeds: those that finished; all means are over them.
        diverged: epoch at which a seed's loss was not finite, by seed.
        accuracy: on the test images.
        train_loss: while training.
        test_loss: on the test images.
        gain: final accuracy less the ordinary arm's of the same seed, by seed.
        reached: first epoch at which the mean accuracy is at least the target, or None.
        ratio: ``reached`` divided by the ordinary arm's ``reached``, or None.
        reached_by_seed: first epoch at which a seed's accuracy is at least the final accuracy of
            the ordinary arm of that seed, or None.
        step_seconds: median time of a training step.
        overhead: median ratio of a step's time to the ordinary arm's next to it.
        overhead_quartiles: first and third quartile of these ratios.

    """

    arm: Arm
    seeds: tuple[int, ...]
    diverged: Mapping[int, int]
    accuracy: Curve
    train_loss: Curve
    test_loss: Curve
    gain: Mapping[int, float]
    reached: int | None
    ratio: float | None
    reached_by_seed: Mapping[int, int | None]
    step_seconds: float
    overhead: float
    overhead_quartiles: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON types."""
        return asdict(self) | {"name": str(self.arm)}


@dataclass(frozen=True)
class Comparison:
    """All arms side by side.

    Args:
        target: the ordinary arm's mean accuracy after its last epoch, or None when it diverged.
        arms: the ordinary one first.

    """

    target: float | None
    arms: tuple[ArmSummary, ...]


def first_epoch_at_least(curve: Sequence[float], target: float) -> int | None:
    """Return the first epoch, counted from 1, whose value is at least the target."""
    return next((epoch for epoch, value in enumerate(curve, 1) if value >= target), None)


def curve_over(rows: Sequence[Sequence[float]]) -> Curve:
    """Return mean and sample deviation, epoch by epoch, of equally long rows, one a seed."""
    columns = list(zip(*rows, strict=True))
    spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
    return Curve(tuple(statistics.fmean(column) for column in columns), tuple(spread))


def compare_runs(runs: Sequence[RunRecord], timing: Mapping[str, Any]) -> Comparison:
    """Summarise a complete set of runs.

    Args:
        runs: every arm with every seed.
        timing: what :func:`tract_hub.studies.compare.timing.time_steps` returned.

    Raises:
        UnpairedRunsError: the arms of a seed are no fair pair.

    """
    check_paired(runs)
    arms = list(dict.fromkeys(run.arm for run in runs))
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in arms}
    ordinary = {run.seed: run for run in by_arm[ORDINARY] if run.diverged_at is None}
    curve = curve_over([_accuracies(run) for run in ordinary.values()])
    target = curve.mean[-1] if curve.mean else None
    own = None if target is None else first_epoch_at_least(curve.mean, target)
    summaries = [_summary(arm, by_arm[arm], ordinary, (target, own), timing) for arm in arms]
    return Comparison(target, tuple(summaries))


def check_paired(runs: Sequence[RunRecord]) -> None:
    """Raise an UnpairedRunsError unless all arms of a seed had equal starts and batches."""
    for seed in dict.fromkeys(run.seed for run in runs):
        same = [run for run in runs if run.seed == seed]
        if len({run.start for run in same}) > 1:
            raise _unpaired(seed, "started from different weights")
        # A run that diverged stopped early, and so saw less.
        if len({run.batches for run in same if run.diverged_at is None}) > 1:
            raise _unpaired(seed, "saw different batches")


def _unpaired(seed: int, how: str) -> UnpairedRunsError:
    return UnpairedRunsError(
        f"the arms of seed {seed} {how}, so they are no fair pair: delete the runs of that seed in "
        "the folder of results, and run the same command again"
    )


def _summary(
    arm: Arm,
    runs: Sequence[RunRecord],
    ordinary: Mapping[int, RunRecord],
    goal: tuple[float | None, int | None],
    timing: Mapping[str, Any],
) -> ArmSummary:
    whole = [run for run in runs if run.diverged_at is None]
    target, own = goal
    accuracy = curve_over([_accuracies(run) for run in whole])
    reached = None if target is None else first_epoch_at_least(accuracy.mean, target)
    pairs = [(run, ordinary[run.seed]) for run in whole if run.seed in ordinary]
    return ArmSummary(
        arm=arm,
        seeds=tuple(run.seed for run in whole),
        diverged={run.seed: run.diverged_at for run in runs if run.diverged_at is not None},
        accuracy=accuracy,
        train_loss=curve_over([[e.train_loss for e in run.epochs] for run in whole]),
        test_loss=curve_over([[e.test_loss for e in run.epochs] for run in whole]),
        gain={run.seed: _final(run) - _final(other) for run, other in pairs},
        reached=reached,
        ratio=reached / own if reached is not None and own is not None else None,
        reached_by_seed={
            run.seed: first_epoch_at_least(_accuracies(run), _final(other)) for run, other in pairs
        },
        step_seconds=timing["seconds"][str(arm)],
        overhead=timing["overhead"][str(arm)],
        overhead_quartiles=tuple(timing["overhead_quartiles"][str(arm)]),
    )


def _accuracies(run: RunRecord) -> list[float]:
    return [epoch.accuracy for epoch in run.epochs]


def _final(run: RunRecord) -> float:
    return run.epochs[-1].accuracy
