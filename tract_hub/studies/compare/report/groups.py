"""What dark, bright, dull and contrasting images give to the first layer, next to all images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tract_hub.studies.compare.plots import look
from tract_hub.studies.compare.report.themed import ARMS, FAINT, inline_svg, themed_figure
from tract_hub.studies.compare.tables import Cells

GROUPS = (
    ("darkest quarter", "brightness", False),
    ("brightest quarter", "brightness", True),
    ("lowest-contrast quarter", "contrast", False),
    ("highest-contrast quarter", "contrast", True),
)
WIDTH, HEIGHT = 5.0, 3.5


@dataclass(frozen=True)
class Share:
    """What a group's images give.

    Args:
        ratio: mean norm of its images' terms, over the mean of all images.
        error: standard error of that mean, over the same.

    """

    ratio: float
    error: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ± {self.error:.2f}"


Shares = dict[str, list[Share]]
"""By arm, in the order of ``GROUPS``."""


def shares(measured: Mapping[str, Any]) -> Shares | None:
    """Return every group's share in every arm.

    Args:
        measured: what ``measure_contributions`` returned.

    Returns:
        None where a norm is no number, or an arm's are all zero.

    """
    norms = measured["norms"]
    if any(None in values or not any(values) for values in norms.values()):
        return None
    chosen = [_quarter(measured[quantity], highest) for _, quantity, highest in GROUPS]
    return {arm: [_share(values, group) for group in chosen] for arm, values in norms.items()}


def _quarter(values: Sequence[float], highest: bool) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__, reverse=highest)
    return order[: max(1, len(values) // 4)]


def _share(norms: Sequence[float], group: Sequence[int]) -> Share:
    mean = statistics.fmean(norms)
    chosen = [norms[i] / mean for i in group]
    error = statistics.stdev(chosen) / len(chosen) ** 0.5 if len(chosen) > 1 else 0.0
    return Share(statistics.fmean(chosen), error)


def shares_table(found: Shares, measured: Mapping[str, Any]) -> Cells:
    """Return the shares, and how unequal all images' terms are, every arm a column."""
    rows = [
        (name, *(str(arm_shares[i]) for arm_shares in found.values()))
        for i, (name, _, _) in enumerate(GROUPS)
    ]
    rows.append(("deviation of all images", *(_deviation(measured["norms"][arm]) for arm in found)))
    return Cells("Norm of an image’s update over the mean of all", ("", *found), tuple(rows))


def _deviation(norms: Sequence[float]) -> str:
    return f"{statistics.pstdev(norms) / statistics.fmean(norms):.2f}"


def draw_shares(found: Shares) -> Markup:
    """Return the shares as a drawing: groups below each other, every arm a marker."""
    with themed_figure(WIDTH, HEIGHT) as figure:
        axes = figure.subplots()
        axes.axvline(1.0, color=FAINT, linewidth=0.9, zorder=0)
        for i, arm_shares in enumerate(found.values()):
            offset = 0.5 * ((i + 0.5) / len(found) - 0.5)
            places = [group + offset for group in range(len(GROUPS))]
            errors = [share.error for share in arm_shares]
            style = look(i, ARMS) | {"linestyle": "none", "markersize": 6, "capsize": 3}
            axes.errorbar([share.ratio for share in arm_shares], places, xerr=errors, **style)
        axes.set_yticks(range(len(GROUPS)), [name.replace(" ", "\n") for name, _, _ in GROUPS])
        axes.invert_yaxis()
        axes.set_xlim(left=0.0)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("norm of an image’s update, mean = 1")
        says = "; ".join(
            f"{arm}: " + ", ".join(f"{g[0]} {s}" for g, s in zip(GROUPS, values, strict=True))
            for arm, values in found.items()
        )
        return inline_svg(figure, "shares", says)
