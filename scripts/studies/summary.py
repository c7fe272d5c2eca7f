"""All studies in one table: python scripts/studies/summary.py docs/results/studies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from report import FORMAT

from tract_hub.studies.files import write_atomically

LAM = 0.1
HEAD = (
    "| study | part | epochs | gain in points, λ = 0.1 |  | ratio of epochs |\n"
    "| --- | --- | --: | --- | --- | --- |"
)
NOTE = (
    "TrAct with λ = 0.1 against ordinary training of the same part, length and seeds; brackets are "
    "95 % confidence intervals over paired seeds. The ratio of epochs is that to the ordinary "
    "model's final accuracy; below 1 is faster. What two studies share was trained once and stands "
    "in both."
)


def summarise(folder: Path) -> str:
    """Return a page with a line for each part and length of every study that has TrAct.

    Args:
        folder: holds a folder with a study.json for each study.

    Raises:
        ValueError: a file is of another format.

    """
    rows, links = [], []
    for path in sorted(folder.glob("*/study.json")):
        study = json.loads(path.read_text(encoding="utf-8"))
        if study.get("format") != FORMAT:
            raise ValueError(f"{path} is of another format than {FORMAT}: run its study again")
        name = study["study"]
        subject = study["title"].partition(": ")[2].partition(",")[0]
        shown = f"{name}: {subject}" if subject else name
        rows += [_row(shown, line) for line in study["lines"] if line["lam"] == LAM]
        links.append(f"- [{name}: {study['title']}](studies/{name}/table.md)")
    table = ["## All with λ = 0.1", "", NOTE, "", HEAD, *rows]
    return "\n".join(["# What the studies show", "", *table, "", "## Each", "", *links]) + "\n"


def _row(name: str, line: dict[str, Any]) -> str:
    gain, ratio = line["gain"], line["epoch_ratio"]
    seeds = len(line["accuracies"]) + line["diverged"]
    points = _bracketed(gain, 100, "+.1f") if gain else "diverged"
    reached = _bracketed(ratio, 1, ".2f") if ratio else f"{line['reached']} of {seeds} got there"
    cells = (name, line["part"], str(line["epochs"]), points, line["verdict"], reached)
    return f"| {' | '.join(cells)} |"


def _bracketed(interval: dict[str, float | None], scale: float, form: str) -> str:
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    text = f"{mean * scale:{form}}"
    return text if low is None else f"{text} [{low * scale:{form}}, {high * scale:{form}}]"


if __name__ == "__main__":
    results = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results/studies")
    write_atomically(results.parent / "studies.md", summarise(results))
