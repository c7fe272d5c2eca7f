"""The pictures of a comparison: curves, paired difference and speed under the verdict; lengths."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tract_hub.studies.verdict import Curves, Outcome, Study, half_width_of_mean, paired

ARM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
ORDINARY_COLOUR = "#777777"
PROFILE = [share / 100 for share in range(50, 101)]
"""Shares of the ordinary final accuracy at which the speed-up is drawn."""


def draw(study: Study, found: Sequence[Outcome], title: str, epochs: int) -> bytes:
    """Draw the outcomes at one length of training, as a PNG; the first is in the title."""
    shown = [one for one in found if one.epochs == one.against == epochs]
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    ordinary = shown[0].theirs
    _curve(left, ordinary, "ordinary", ORDINARY_COLOUR)
    for one, colour in zip(shown, ARM_COLOURS, strict=False):
        _curve(left, one.ours, one.arm, colour)
        _difference(middle, one, colour)
        _speed(right, one, colour)
    metric = study.metric.replace("_", " ").capitalize()
    left.set_title(f"{metric}, mean of {len(ordinary.seeds)} seeds")
    left.set_ylabel("%")
    left.legend(frameon=False, fontsize=8)
    middle.axhline(0, color=ORDINARY_COLOUR, linewidth=1)
    middle.set_title("Difference, paired by seed (95 %)")
    middle.set_ylabel("points")
    right.axhline(1, color=ORDINARY_COLOUR, linewidth=1)
    right.set_title("Epochs needed, over ordinary (95 %)")
    right.set_xlabel("accuracy to reach, %")
    for axes in (left, middle):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    verdict = textwrap.fill(shown[0].sentence, 135)
    figure.suptitle(f"{title}\n{verdict}", fontsize=11, x=0.01, ha="left")
    return _png(figure)


def draw_lengths(rows: pd.DataFrame, study: Study, arms: Sequence[str], title: str) -> bytes:
    """Draw final accuracy against length of training, as a PNG; bars are 95 % over the seeds."""
    figure = Figure(figsize=(6.5, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for arm, colour in zip(arms, (ORDINARY_COLOUR, *ARM_COLOURS), strict=False):
        runs = {epochs: study.curves(rows, arm, epochs) for epochs in study.lr}
        final = {n: 100 * one.accuracy[:, -1] for n, one in runs.items() if one.seeds}
        means = [values.mean() for values in final.values()]
        halves = [half_width_of_mean(values) for values in final.values()]
        axes.errorbar(list(final), means, halves, color=colour, label=arm, marker="o", capsize=3)
    axes.set_xscale("log")
    axes.set_xticks(list(study.lr), [str(epochs) for epochs in study.lr], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("epochs of training, each with its own schedule")
    axes.set_ylabel(f"final {study.metric.replace('_', ' ')}, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(textwrap.fill(title, 80), fontsize=10, loc="left")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _curve(axes: Any, runs: Curves, name: str, colour: str) -> None:
    mean = 100 * runs.accuracy.mean(0)
    epochs = np.arange(1, len(mean) + 1)
    axes.plot(epochs, mean, color=colour, label=name, marker="o", markersize=3)
    axes.plot(epochs, 100 * runs.accuracy.T, color=colour, linewidth=0.5, alpha=0.35)


def _difference(axes: Any, outcome: Outcome, colour: str) -> None:
    each = outcome.ours.correct.astype(float) - outcome.theirs.correct
    classes = outcome.study.classes
    by_epoch = [paired(each[:, epoch], classes) for epoch in range(each.shape[1])]
    mean = 100 * np.array([float(one.mean) for one in by_epoch])
    half = 100 * np.array([float(one.half_width()) for one in by_epoch])
    epochs = np.arange(1, len(mean) + 1)
    axes.plot(epochs, mean, color=colour, marker="o", markersize=3)
    if len(epochs) > 1:
        axes.fill_between(epochs, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    else:
        axes.errorbar(epochs, mean, half, color=colour, capsize=4)


def _speed(axes: Any, outcome: Outcome, colour: str) -> None:
    profile = {100 * share * outcome.accuracy[1]: outcome.speed(share) for share in PROFILE}
    closed = {level: ratio for level, ratio in profile.items() if not ratio.open}
    axes.plot(list(closed), [ratio.mean for ratio in closed.values()], color=colour)
    low, high = ([getattr(ratio, end) for ratio in closed.values()] for end in ("low", "high"))
    axes.fill_between(list(closed), low, high, color=colour, alpha=0.2, linewidth=0)
    bounds = {level: ratio.mean for level, ratio in profile.items() if ratio.open}
    # Lower bounds: levels that not every seed reached.
    axes.plot(list(bounds), list(bounds.values()), "^", color=colour, markersize=3)
