"""A study as one picture: a panel for each part."""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Sequence
from itertools import chain

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter
from speedup import finished
from study import Study
from trainings import Trained

from tract_hub.studies.compare.plots import COLOURS, STYLES, look
from tract_hub.studies.compare.records import Arm

PANEL_INCHES, DPI, MOST_CURVES = (3.6, 3.4), 150, 5


def draw(study: Study, trained: Sequence[Trained]) -> bytes:
    """Return the picture as PNG.

    Without TrAct, one panel has the final accuracy by part. Else a part of several lengths shows
    the final accuracy by length, one of many λ by λ, another its accuracy by epoch; bars and bands
    are the sample deviation over seeds.

    Args:
        study: gives the title.
        trained: all parts and lengths.

    """
    names = list(dict.fromkeys(t.part.name for t in trained))
    if not any(t.part.lams for t in trained):
        return _png(_by_part(study, trained))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    width, height = PANEL_INCHES
    size = (max(7.0, width * columns), height * rows + 0.9)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, name in zip(panels, names, strict=False):
        _draw_part(axes, [t for t in trained if t.part.name == name])
        axes.set_title(name, fontsize=10)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel("test accuracy, mean and\ndeviation over seeds")
    _name_once(figure, panels)
    figure.suptitle(_titled(study), fontsize=11)
    return _png(figure)


def _name_once(figure: Figure, panels: Sequence[Axes]) -> None:
    """Put one legend below all panels, with each label once."""
    pairs = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels)
    labels = {label: handle for handle, label in chain.from_iterable(pairs)}
    where = {"loc": "outside lower center", "ncols": 5, "frameon": False, "fontsize": 9}
    figure.legend(labels.values(), labels.keys(), **where)


def _titled(study: Study) -> str:
    return "\n".join(textwrap.fill(line, 80) for line in (study.title, study.scale))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _by_part(study: Study, trained: Sequence[Trained]) -> Figure:
    figure = Figure(figsize=(7.0, 1.2 + 0.32 * len(trained)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    whole = [t for t in trained if finished(t.runs, None)]
    means, spreads = zip(*(_final(t, None) for t in whole), strict=True)
    names = [f"{t.part.name}, {t.part.epochs} epochs" for t in whole]
    axes.errorbar(means, names, xerr=spreads, capsize=3, linestyle="", marker="o", color=COLOURS[0])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("test accuracy, mean and deviation over seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    figure.suptitle(_titled(study), fontsize=10)
    return figure


def _draw_part(axes: Axes, lengths: Sequence[Trained]) -> None:
    if len(lengths) > 1:
        _draw_by_length(axes, lengths)
    elif len(lengths[0].part.lams) >= MOST_CURVES:
        _draw_by_lam(axes, lengths[0])
    else:
        _draw_by_epoch(axes, lengths[0])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.6)


def _draw_by_length(axes: Axes, lengths: Sequence[Trained]) -> None:
    for i, lam in enumerate((None, *lengths[0].part.lams)):
        points = [(t.part.epochs, *_final(t, lam)) for t in lengths if finished(t.runs, lam)]
        if points:
            epochs, means, spreads = zip(*points, strict=True)
            axes.errorbar(epochs, means, spreads, capsize=3, label=str(Arm(lam)), **look(i))
    ticks = [t.part.epochs for t in lengths]
    axes.set(xscale="log", xlabel="epochs of the whole schedule")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [str(tick) for tick in ticks])


def _draw_by_lam(axes: Axes, trained: Trained) -> None:
    points = [
        (lam, *_final(trained, lam)) for lam in trained.part.lams if finished(trained.runs, lam)
    ]
    if points:
        lams, means, spreads = zip(*points, strict=True)
        axes.errorbar(lams, means, spreads, capsize=3, label="TrAct", **look(1))
    if finished(trained.runs, None):
        mean, spread = _final(trained, None)
        axes.axhline(mean, label="ordinary", color=COLOURS[0], linestyle=STYLES[0])
        axes.axhspan(mean - spread, mean + spread, color=COLOURS[0], alpha=0.1, linewidth=0)
    lams = trained.part.lams
    axes.set(xscale="log", xlabel="λ")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(lams, [f"{lam:g}" for lam in lams], rotation=45)


def _draw_by_epoch(axes: Axes, trained: Trained) -> None:
    for i, lam in enumerate((None, *trained.part.lams)):
        runs = finished(trained.runs, lam).values()
        by_epoch = list(zip(*(run.accuracies for run in runs), strict=True))
        if by_epoch:
            epochs = range(1, len(by_epoch) + 1)
            means = [statistics.fmean(values) for values in by_epoch]
            spreads = [_deviation(values) for values in by_epoch]
            axes.plot(
                epochs, means, label=str(Arm(lam)), markevery=max(1, len(means) // 8), **look(i)
            )
            low, high = (
                [m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(epochs, low, high, color=COLOURS[i], alpha=0.12, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _final(trained: Trained, lam: float | None) -> tuple[float, float]:
    values = [run.accuracies[-1] for run in finished(trained.runs, lam).values()]
    return statistics.fmean(values), _deviation(values)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
