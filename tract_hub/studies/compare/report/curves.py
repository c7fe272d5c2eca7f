"""Accuracy and losses by epoch, every arm with its band."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from tract_hub.studies.compare.aggregate import ArmSummary, Comparison, Curve
from tract_hub.studies.compare.plots import arm_label, draw_curve, frame, look
from tract_hub.studies.compare.report.themed import ARMS, FAINT, inline_svg, themed_figure

WIDTH, HEIGHT = 5.0, 3.5
SAMPLE = (0.55, 0.18)


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Args:
        field: of ``ArmSummary``, a curve.
        title: above it.

    """

    field: str
    title: str

    def curve(self, arm: ArmSummary) -> Curve:
        """Return the curve of one arm."""
        curve: Curve = getattr(arm, self.field)
        return curve


PANELS = (
    Panel("accuracy", "Test accuracy"),
    Panel("test_loss", "Test loss (cross-entropy, nats)"),
    Panel("train_loss", "Training loss"),
)


def curve_panels(comparison: Comparison, classes: int) -> list[tuple[str, Markup]]:
    """Return a title and a drawing for every panel.

    Args:
        comparison: the curves.
        classes: how many there are; chance is one in so many.

    """
    return [(panel.title, _drawn(panel, comparison, classes)) for panel in PANELS]


def _drawn(panel: Panel, comparison: Comparison, classes: int) -> Markup:
    with themed_figure(WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        for i, arm in enumerate(comparison.arms):
            draw_curve(axes, panel.curve(arm), i, "", ARMS)
        if panel.field == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            _draw_levels(axes, comparison.target, 1 / classes)
        frame(axes, comparison)
        axes.grid(axis="y")
        axes.set_xlabel("epoch")
        names = ", ".join(str(arm.arm) for arm in comparison.arms)
        says = f"{panel.title} by epoch, mean and deviation over seeds: {names}"
        return inline_svg(figure, panel.field.replace("_", "-"), says)


def _draw_levels(axes: Axes, target: float | None, chance: float) -> None:
    if target is not None:
        axes.axhline(target, color=FAINT, linewidth=0.9, zorder=0)
    axes.axhline(chance, color=FAINT, linewidth=0.9, linestyle=":", zorder=0)


def legend(comparison: Comparison) -> list[tuple[Markup, str]]:
    """Return a sample of every arm's line with its name, and of the two levels."""
    arms = [
        (_sample(look(i, ARMS), f"arm-{i}"), arm_label(arm))
        for i, arm in enumerate(comparison.arms)
    ]
    level = {"color": FAINT, "linewidth": 0.9}
    levels = [(_sample(level | {"linestyle": ":"}, "chance"), "chance")]
    if comparison.target is not None:
        words = f"ordinary’s final accuracy, {comparison.target:.1%}"
        levels.insert(0, (_sample(level, "target"), words))
    return arms + levels


def _sample(style: dict[str, object], name: str) -> Markup:
    with themed_figure(*SAMPLE) as figure:
        figure.set_layout_engine("none")
        line = Line2D([0, 0.5, 1], [0.5, 0.5, 0.5], markevery=[1], transform=figure.transFigure)
        line.set(**style)
        figure.add_artist(line)
        return inline_svg(figure, f"sample-{name}", "")
