"""What the rows of a study show: differences, speed-ups, their intervals, and one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from tract_hub.studies import table

Array = npt.NDArray[np.float64]
CONFIDENCE = 0.95
POWER = 0.8
WORTH_SHOWING = 0.03
"""A difference that a user would act on, in accuracy: how many seeds would show it is said."""
LEVELS = (0.5, 0.8, 0.95)
"""Shares of the ordinary final accuracy at which the speed-up is told."""
ABOVE_CHANCE = 0.02
"""Share of the way from chance to 100 % below which a training has learned nothing to compare."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; ``open`` where the mean and the high end are lower bounds."""

    mean: float
    low: float
    high: float
    open: bool = False

    def points(self) -> str:
        """Write a difference of accuracies: ``"+4.1 points [+0.3, +7.9]"``."""
        ends = (self.mean, self.low, self.high)
        mean, low, high = (f"{100 * x:+.1f}".replace("-", "−") for x in ends)
        return f"{mean} points [{low}, {high}]"

    def ratio(self) -> str:
        """Write a ratio: ``"0.80 [0.70, 0.90]"``, ``"1.05 or more [0.98, …]"``."""
        if math.isnan(self.mean):
            return "—"
        if math.isnan(self.low):
            return f"{self.mean:.2f}" + (" or more" if self.open else "")
        if self.open:
            return f"{self.mean:.2f} or more [{self.low:.2f}, …]"
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def __mul__(self, factor: float) -> Interval:
        return Interval(self.mean * factor, self.low * factor, self.high * factor, self.open)


NO_INTERVAL = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Variance:
    """Mean paired difference, and the variances of that mean; arrays of any shape.

    They are those with other seeds, with other test images, and the least that so many test images
    can show.
    """

    mean: Array
    seed: Array
    test: Array
    floor: float
    seeds: int
    images: int

    def half_width(self) -> Array:
        """Half the width of the interval.

        The half-widths of both sources are added as variances are (MOVER, as Graybill and Wang's).
        With 2 or 3 seeds, Satterthwaite's degrees of freedom cover no more than 88 to 93 %.
        """
        level = (1 + CONFIDENCE) / 2
        by_seed = stats.t.ppf(level, self.seeds - 1) ** 2 * self.seed if self.seeds > 1 else 0.0
        by_test = stats.t.ppf(level, self.images - 1) ** 2 * self.test
        least = stats.norm.ppf(level) ** 2 * self.floor
        half: Array = np.sqrt(np.maximum(by_seed + by_test, least))
        return half

    def interval(self) -> Interval:
        """The interval, where there is one."""
        mean, half = float(self.mean), float(self.half_width())
        return Interval(mean, mean - half, mean + half)


def paired(differences: Array, labels: npt.NDArray[Any] | None = None) -> Variance:
    """Split the variance of a mean paired difference into that of seeds and that of test images.

    Seeds and test images are two random factors, crossed: what differs between seeds holds a part
    of the images' noise, and what differs between images a part of the seeds'. That part is in
    both; it is taken off one of them.

    Differences are … × seeds × test images: correct with TrAct (1 or 0) less correct without, or a
    mean of such over epochs. With labels, the means of the classes count alike (balanced accuracy).
    """
    seeds, images = differences.shape[-2:]
    labels = np.zeros(images, dtype=int) if labels is None else np.unique(labels, False, True)[1]
    one_hot = np.eye(labels.max() + 1)[labels]
    count = one_hot.sum(0)
    weight = (1 / (len(count) * count))[labels]
    spread = weight**2 * (count / np.maximum(count - 1, 1))[labels]

    def centred(values: Array) -> Array:
        return values - ((values @ one_hot) / count)[..., labels]  # type: ignore[no-any-return]

    by_seed, by_image = differences @ weight, differences.mean(-2)
    image = (spread * centred(by_image) ** 2).sum(-1)
    if seeds == 1:
        unknown = np.full(image.shape, np.nan)
        return Variance(by_seed[..., 0], unknown, image, weight.max() ** 2, seeds, images)
    rest = centred(differences - by_image[..., None, :])
    both = (spread * (rest**2).sum(-2)).sum(-1) / (seeds * (seeds - 1))
    seed = by_seed.var(-1, ddof=1) / seeds
    test = np.maximum(image - both, 0)
    return Variance(by_seed.mean(-1), seed, test, weight.max() ** 2, seeds, images)


def seeds_needed(variance: Variance) -> int | None:
    """Return how many seeds show 3 points in 4 of 5 cases; None if no number of seeds does."""
    one_seed = float(variance.seed) * variance.seeds
    surely, mostly = (1 + CONFIDENCE) / 2, POWER
    by_test = (stats.norm.ppf(surely) + stats.norm.ppf(mostly)) ** 2 * float(variance.test)
    for seeds in range(2, 1001):
        reach = stats.t.ppf(surely, seeds - 1) + stats.t.ppf(mostly, seeds - 1)
        if reach**2 * one_seed / seeds + by_test <= WORTH_SHOWING**2:
            return seeds
    return None


@dataclass(frozen=True)
class Curves:
    """The runs of one arm at one length and learning rate.

    Accuracy, in the study's metric, is seeds × epochs; correct is seeds × epochs × test images.
    """

    seeds: tuple[int, ...]
    accuracy: Array
    correct: npt.NDArray[np.bool_]

    def of(self, seeds: Sequence[int]) -> Curves:
        """Return the runs of these seeds."""
        at = [self.seeds.index(seed) for seed in seeds]
        return Curves(tuple(seeds), self.accuracy[at], self.correct[at])


def epochs_to(curve: Array, level: float, start: float) -> float:
    """Return the epochs until an accuracy is reached first, interpolated; infinity if it is not.

    The curve holds the accuracy after each epoch; before the first one it is at the start: chance.
    """
    best = np.maximum.accumulate(np.concatenate([[start], curve]))
    if level > best[-1]:
        return math.inf
    after = int(np.argmax(best >= level))
    if after == 0:
        return 0.0
    before, step = best[after - 1], best[after] - best[after - 1]
    return float(after - 1 + (level - before) / step)


def half_width_of_mean(values: Sequence[float] | Array) -> float:
    """Half the width of the interval of a mean over seeds, by Student's t; NaN for one seed."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * pd.Series(values).sem())


def epoch_ratio(arm: Curves, ordinary: Curves, share: float, start: float) -> Interval:
    """Return the epochs that an arm needs over those of ordinary training, paired by seed.

    The level to reach is a share of each ordinary run's final accuracy. Geometric mean and
    interval are over seeds. A run that does not reach the level counts with its whole length,
    which is a lower bound; the interval is then open above. Not a number where the level is no
    higher than the start.
    """
    logs, censored = [], False
    for ours, theirs in zip(arm.accuracy, ordinary.accuracy, strict=True):
        level = share * theirs[-1]
        own, other = epochs_to(ours, level, start), epochs_to(theirs, level, start)
        if not 0 < other < math.inf or own == 0:
            return NO_INTERVAL
        censored |= math.isinf(own)
        logs.append(math.log(min(own, len(ours)) / other))
    mean = float(np.mean(logs))
    if len(logs) < 2:
        return Interval(math.exp(mean), math.nan, math.nan, censored)
    half = half_width_of_mean(logs)
    low, high = math.exp(mean - half), math.exp(mean + half)
    return Interval(math.exp(mean), low, math.inf if censored else high, censored)


@dataclass(frozen=True)
class Study:
    """What the figures need to know beside the rows.

    That is the metric, a column of the table; the classes of the test images; and the learning
    rate at each length.
    """

    metric: str
    labels: npt.NDArray[Any]
    lr: dict[int, float]

    @property
    def chance(self) -> float:
        """The accuracy of a classifier that always answers the same."""
        count = np.unique(self.labels, return_counts=True)[1]
        largest = 1 / len(count) if self.metric == "balanced_accuracy" else count.max() / sum(count)
        return float(largest)

    @property
    def classes(self) -> npt.NDArray[Any] | None:
        """The labels where classes count alike, else None."""
        return self.labels if self.metric == "balanced_accuracy" else None

    def at_chance(self, accuracy: float) -> bool:
        """Whether a final accuracy is no more than chance gives."""
        noise = 2 * math.sqrt(self.chance * (1 - self.chance) / len(self.labels))
        return accuracy <= self.chance + max(noise, ABOVE_CHANCE * (1 - self.chance))

    def curves(self, rows: pd.DataFrame, arm: str, epochs: int) -> Curves:
        """Return the finished runs of an arm at a length."""
        own = (rows["arm"] == arm) & (rows["epochs"] == epochs) & (rows["lr"] == self.lr[epochs])
        finished = rows[own].groupby("seed").filter(lambda run: len(run) == epochs)
        images = len(self.labels)
        if finished.empty:
            return Curves((), np.empty((0, epochs)), np.empty((0, epochs, images), dtype=bool))
        accuracy = finished.pivot(index="seed", columns="epoch", values=self.metric)
        texts = finished.pivot(index="seed", columns="epoch", values="correct").to_numpy()
        correct = np.array([[table.unpack(text, images) for text in line] for line in texts])
        return Curves(tuple(map(int, accuracy.index)), accuracy.to_numpy(dtype=float), correct)


@dataclass(frozen=True)
class Outcome:
    """One arm at its length against ordinary training, by the seeds that finished both.

    The ordinary training's length, ``against``, is a longer one where it is asked whether a shorter
    training reaches the same. ``step`` is the seconds of a step over those of an ordinary one.
    """

    arm: str
    epochs: int
    against: int
    ours: Curves
    theirs: Curves
    step: float
    study: Study

    @property
    def seeds(self) -> int:
        """How many pairs."""
        return len(self.ours.seeds)

    @property
    def accuracy(self) -> tuple[float, float]:
        """Mean final accuracies of the arm and of ordinary training."""
        return float(self.ours.accuracy[:, -1].mean()), float(self.theirs.accuracy[:, -1].mean())

    @cached_property
    def difference(self) -> Variance:
        """Of the final accuracies."""
        last = self.ours.correct[:, -1].astype(float) - self.theirs.correct[:, -1]
        return paired(last, self.study.classes)

    @property
    def final(self) -> Interval:
        """Difference of the final accuracies."""
        return self.difference.interval()

    @cached_property
    def curve(self) -> Interval:
        """Mean over the epochs of the difference, of trainings of one length."""
        if self.epochs != self.against:
            return NO_INTERVAL
        mean = self.ours.correct.mean(1) - self.theirs.correct.mean(1)
        return paired(mean, self.study.classes).interval()

    def speed(self, share: float) -> Interval:
        """Ratio of epochs to a share of the ordinary final accuracy, of trainings of one length."""
        if self.epochs != self.against:
            return NO_INTERVAL
        return epoch_ratio(self.ours, self.theirs, share, self.study.chance)

    @property
    def sentence(self) -> str:
        """What the seeds show, and what would settle what they do not."""
        level, final, arm = self.accuracy[1], self.final, self.arm
        if self.study.at_chance(level):
            return (
                "This comparison says nothing about TrAct: ordinary training ended at chance "
                f"({level:.1%} where chance is {self.study.chance:.1%}; {arm}: "
                f"{self.accuracy[0]:.1%})."
            )
        when = f"after {self.epochs} epoch{'s' * (self.epochs > 1)}"
        if self.against != self.epochs:
            when += f", against {self.against} of ordinary training"
        if self.seeds == 1:
            return (
                f"One seed cannot tell: {arm} ended {100 * final.mean:+.1f} points from ordinary "
                f"training {when}; give at least 3 seeds."
            )
        share = LEVELS[-1]
        ratio = self.speed(share)
        reached = (
            f"it reaches ordinary training's {share * level:.0%} in {ratio.ratio()} of the epochs"
        )
        if final.low > 0 or final.high < 0:
            same = self.epochs == self.against
            better, worse = ("helped", "hurt") if same else ("ended higher", "ended lower")
            verb = better if final.low > 0 else worse
            said = f"{arm} {verb}: {final.points()} {when}, {self.seeds} seeds"
            said += "" if math.isnan(ratio.mean) else f"; {reached}"
        else:
            said = f"No difference shown {when}: {arm} {final.points()} with {self.seeds} seeds"
            said += self._what_would_settle_it()
            if self.curve.low > 0 or self.curve.high < 0:
                side = "ahead" if self.curve.low > 0 else "behind"
                said += f". On the way it was {side}: {self.curve.points()}, mean over the epochs"
                said += "" if math.isnan(ratio.mean) else f"; {reached}"
        said += ". 2 seeds are few: give at least 3." if self.seeds == 2 else "."
        collapsed = sum(map(self.study.at_chance, self.theirs.accuracy[:, -1]))
        if collapsed:
            said += f" {collapsed} of {self.seeds} ordinary trainings ended at chance."
        return said

    def _what_would_settle_it(self) -> str:
        reach = max(-self.final.low, self.final.high)
        if reach < WORTH_SHOWING:
            return f", so differences of {100 * reach:.1f} points or more are unlikely"
        needed = seeds_needed(self.difference)
        if needed is None:
            count = self.difference.images
            return f"; no number of seeds shows 3 points on {count} test images"
        return f"; about {max(needed, self.seeds + 1)} seeds would show 3 points"


def outcomes(
    rows: pd.DataFrame,
    study: Study,
    arms: Sequence[tuple[str, int]],
    steps: Mapping[str, float] = MappingProxyType({}),
) -> list[Outcome]:
    """Compare arms at their lengths with ordinary training of that length, and of longer ones.

    The arm that the verdict is about comes first; steps are seconds over those of ordinary ones.
    """
    found = []
    for arm, epochs in arms:
        for against in sorted(length for length in study.lr if length >= epochs):
            ours = study.curves(rows, arm, epochs)
            theirs = study.curves(rows, "ordinary", against)
            both = sorted(set(ours.seeds) & set(theirs.seeds))
            if both:
                pair, step = (ours.of(both), theirs.of(both)), steps.get(arm, 1.0)
                found.append(Outcome(arm, epochs, against, *pair, step, study))
    return found


def summary(found: Sequence[Outcome]) -> pd.DataFrame:
    """Return the outcomes as a table of texts: a line an arm and length."""
    lines = []
    for one in found:
        line = {
            "arm": one.arm,
            "epochs": str(one.epochs),
            "ordinary epochs": str(one.against),
            "seeds": str(one.seeds),
            "ordinary accuracy": f"{one.accuracy[1]:.1%}",
            "accuracy": f"{one.accuracy[0]:.1%}",
            "difference": one.final.points(),
            "mean over epochs": "—" if math.isnan(one.curve.mean) else one.curve.points(),
        }
        for share in LEVELS:
            ratio = one.speed(share)
            line[f"epochs to {share:.0%}"] = ratio.ratio()
            line[f"seconds to {share:.0%}"] = (ratio * one.step).ratio()
        lines.append(line)
    return pd.DataFrame(lines)
