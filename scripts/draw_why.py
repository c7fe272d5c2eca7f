"""Draw why TrAct: which images a first layer learns from. python scripts/draw_why.py

Reads contributions.json in docs/results/compare-digits, measured by `tract-hub compare --report`,
and writes why.png beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tract_hub.studies.compare.plots import COLOURS
from tract_hub.studies.compare.report.groups import GROUPS, shares

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "compare-digits"


def main() -> None:
    measured = json.loads((FOLDER / "contributions.json").read_text(encoding="utf-8"))
    found = shares(measured)
    if found is None:
        raise SystemExit("some norm is no number: there is nothing to draw")
    figure = Figure(figsize=(7.2, 3.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = 0.8 / len(found)
    for i, (arm, groups) in enumerate(found.items()):
        places = [j + (i - (len(found) - 1) / 2) * height for j in range(len(groups))]
        ratios, errors = [s.ratio for s in groups], [s.error for s in groups]
        look = {"color": COLOURS[i], "alpha": 0.85, "height": height * 0.92}
        axes.barh(places, ratios, xerr=errors, label=arm, capsize=2, **look)
    axes.set_yticks(range(len(GROUPS)), [name for name, _, _ in GROUPS])
    axes.invert_yaxis()
    axes.axvline(1, color="#777777", linewidth=0.9)
    axes.set_xlabel("update of the first layer by an image, mean of all images = 1")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(FOLDER / "why.png")


if __name__ == "__main__":
    main()
