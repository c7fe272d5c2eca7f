"""The page itself: everything in one file, nothing of it run, everything of the user's escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tract_hub.studies.compare.aggregate import Comparison
from tract_hub.studies.compare.records import RunRecord
from tract_hub.studies.compare.report.curves import curve_panels, legend
from tract_hub.studies.compare.report.filters import strips
from tract_hub.studies.compare.report.groups import draw_shares, shares, shares_table
from tract_hub.studies.compare.tables import NOTES, Cells

LINES_OPEN = 40


@dataclass(frozen=True)
class Report:
    """What the page is made of.

    Args:
        title: of the comparison.
        command: that made it.
        facts: what was compared.
        accuracy: by epoch.
        gain: what TrAct gained.
        comparison: the curves.
        runs: where the filters come from.
        classes: how many there are.
        contributions: what ``measure_contributions`` returned, or why it could not.
        versions: of packages, by name.

    """

    title: str
    command: str
    facts: Cells
    accuracy: Cells
    gain: Cells
    comparison: Comparison
    runs: Sequence[RunRecord]
    classes: int
    contributions: Mapping[str, Any] | str
    versions: Mapping[str, str]


def render(report: Report) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=PackageLoader("tract_hub.studies.compare.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    versions = Cells("Versions", ("package", "version"), tuple(report.versions.items()))
    return environment.get_template("page.html").render(
        report=report,
        notes=NOTES,
        versions=versions,
        legend=legend(report.comparison),
        panels=curve_panels(report.comparison, report.classes),
        strips=strips(report.comparison, report.runs),
        lines_open=LINES_OPEN,
        **_shares(report.contributions),
    )


def _shares(measured: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return what the page says of single images, or why it cannot."""
    if isinstance(measured, str):
        return {"shares": None, "why_not": measured}
    found = shares(measured)
    if found is None:
        return {
            "shares": None,
            "why_not": "at the start weights, the first layer’s gradient is zero or not finite",
        }
    return {
        "shares": draw_shares(found),
        "shares_table": shares_table(found, measured),
        "measured": measured,
        "images": len(measured["brightness"]),
    }
