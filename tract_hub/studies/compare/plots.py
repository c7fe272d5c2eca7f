"""A comparison as one picture: accuracy, loss, and the first layer's filters."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from tract_hub.studies.compare.aggregate import ArmSummary, Comparison, Curve
from tract_hub.studies.compare.records import RunRecord

# Okabe and Ito's colours, told apart in every common kind of colour blindness, darkest first;
# line styles and markers say the same again for prints without colour.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("--", "-", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("s", "o", "^", "D", "v", "P", "X")
LEGEND: dict[str, Any] = {"ncols": 2, "frameon": False, "fontsize": 9}
WIDTH_INCHES, TOP_INCHES, FILTER_ROW_INCHES, DPI = 9.0, 4.2, 0.66, 160


def draw(comparison: Comparison, runs: Sequence[RunRecord], title: str, classes: int) -> bytes:
    """Return the picture as PNG.

    Args:
        comparison: the curves.
        runs: where the filters come from: each arm's first seed that finished.
        title: above everything.
        classes: how many there are; chance is one in so many.

    """
    shown = [(arm, shown_run(arm, runs)) for arm in comparison.arms]
    height = TOP_INCHES + FILTER_ROW_INCHES * len(shown) + 0.4
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI)
    figure.set_layout_engine("constrained", rect=(0.01, 0.01, 0.98, 0.98))
    FigureCanvasAgg(figure)
    ratios = [TOP_INCHES, height - TOP_INCHES]
    parts: Any = figure.subfigures(2, 1, height_ratios=ratios)
    top, bottom = parts
    figure.suptitle(title, fontsize=12)
    _draw_curves(top, comparison, classes)
    _draw_filters(bottom, shown)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def shown_run(arm: ArmSummary, runs: Sequence[RunRecord]) -> RunRecord | None:
    """Return the run whose filters are shown: the first of the arm's seeds that finished."""
    finished = (run for run in runs if run.arm == arm.arm and run.diverged_at is None)
    return next(finished, None)


def _draw_curves(figure: SubFigure, comparison: Comparison, classes: int) -> None:
    accuracy, loss = figure.subplots(1, 2)
    for i, arm in enumerate(comparison.arms):
        label = arm_label(arm)
        draw_curve(accuracy, arm.accuracy, i, label)
        draw_curve(loss, arm.test_loss, i, label)
    _draw_levels(accuracy, comparison.target, 1 / classes)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    accuracy.set(xlabel="epoch", ylabel="test accuracy")
    loss.set(xlabel="epoch", ylabel="test loss (cross-entropy, nats)")
    for axes in (accuracy, loss):
        frame(axes, comparison)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    # Above both panels, where no curve can run into it.
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside upper center", **LEGEND)


def frame(axes: Axes, comparison: Comparison) -> None:
    """Give axes of curves by epoch their limits, ticks and spines."""
    epochs = max(1, *(len(arm.accuracy.mean) for arm in comparison.arms))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, epochs + 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _draw_levels(axes: Axes, target: float | None, chance: float) -> None:
    if target is not None:
        label = f"ordinary's final accuracy, {target:.1%}"
        axes.axhline(target, color="#777777", linewidth=0.9, zorder=0, label=label)
    axes.axhline(chance, color="#AAAAAA", linewidth=0.9, linestyle=":", zorder=0, label="chance")


def arm_label(arm: ArmSummary) -> str:
    """Return an arm's name, and how many seeds its curve is of."""
    if not arm.seeds:
        return f"{arm.arm} (diverged)"
    lost = f", {len(arm.diverged)} diverged" if arm.diverged else ""
    if len(arm.seeds) == 1:
        return f"{arm.arm} (1 seed{lost})"
    return f"{arm.arm} (mean ± sd, {len(arm.seeds)} seeds{lost})"


def look(index: int, colours: Sequence[str] = COLOURS) -> dict[str, Any]:
    """Return what tells an arm's lines from the others', as arguments of ``Axes.plot``."""
    return {
        "color": colours[index % len(colours)],
        "linestyle": STYLES[index % len(STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def draw_curve(
    axes: Axes, curve: Curve, index: int, label: str, colours: Sequence[str] = COLOURS
) -> None:
    """Draw a mean by epoch and the band of its deviation.

    Args:
        axes: where.
        curve: what.
        index: of the arm.
        label: for a legend.
        colours: of the arms.

    """
    mean, spread = np.array(curve.mean), np.array(curve.spread)
    epochs = np.arange(1, len(mean) + 1)
    style = look(index, colours)
    colour = style["color"]
    axes.plot(epochs, mean, markevery=max(1, len(mean) // 15), label=label, **style)
    if len(mean) == 1:
        # A band needs two epochs.
        axes.errorbar(epochs, mean, spread, color=colour, capsize=4, linewidth=1)
    axes.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)


def _draw_filters(figure: SubFigure, shown: Sequence[tuple[ArmSummary, RunRecord | None]]) -> None:
    known = [run for _, run in shown if run is not None]
    columns = max((len(run.filters.rows) for run in known), default=1)
    weight = known[0].filters.weight if known else "no run finished"
    grid = figure.subplots(len(shown), columns, squeeze=False)
    note = "same rows in every arm, grey is zero"
    figure.suptitle(f"first-layer filters after training ({weight}; {note})", fontsize=10)
    for i, (arm, run) in enumerate(shown):
        images = [] if run is None else filter_images(run.filters.values[-1])
        for axes in grid[i]:
            axes.set_axis_off()
        for axes, image in zip(grid[i], images, strict=False):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        _name_row(grid[i][0], arm, run, i)


def _name_row(axes: Axes, arm: ArmSummary, run: RunRecord | None, index: int) -> None:
    seed = "diverged" if run is None else f"seed {run.seed}"
    axes.text(
        -0.15,
        0.5,
        f"{arm.arm}\n{seed}",
        transform=axes.transAxes,
        ha="right",
        va="center",
        fontsize=8.5,
        color=COLOURS[index % len(COLOURS)],
    )


def filter_images(rows: Sequence[Any]) -> list[NDArray[Any]]:
    """Return filters as pictures in [0, 1]: zero is middle grey, the largest weight an end.

    Three channels are RGB; other numbers of channels are shown side by side in grey; a flattened
    square patch gets its shape back.

    Args:
        rows: of a first layer's weight, as nested lists.

    """
    return [_picture(np.array(values, dtype=float)) for values in rows]


def _picture(row: NDArray[Any]) -> NDArray[Any]:
    block = _as_image(row)
    largest = np.abs(block).max() if block.size else 0.0
    scaled = 0.5 + 0.5 * block / (largest if largest > 0 else 1.0)
    rgb = len(scaled) == 3
    return np.asarray(scaled.transpose(1, 2, 0) if rgb else np.concatenate(list(scaled), axis=1))


def _as_image(row: NDArray[Any]) -> NDArray[Any]:
    """Return a weight row as channels × height × width."""
    if row.ndim == 1:
        return _unflattened(row)
    if row.ndim == 2:
        return row[:, None, :]
    # Of a video tower's filter, the first frame.
    return row if row.ndim == 3 else np.asarray(row[:, 0], dtype=float)


def _unflattened(row: NDArray[Any]) -> NDArray[Any]:
    """Give a flattened patch its shape; pixels come channels-last, as zoos flatten them."""
    for channels in (3, 1):
        side = math.isqrt(len(row) // channels)
        if side * side * channels == len(row):
            return np.asarray(row.reshape(side, side, channels).transpose(2, 0, 1))
    return row[None, None, :]
