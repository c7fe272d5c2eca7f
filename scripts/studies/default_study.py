"""Choose the default study of `tract-hub compare`: by ordinary training alone, TrAct is not run.

    python scripts/studies/default_study.py [FOLDER]

The images keep their own size. For each length, the learning rate is the one that ordinary training
ends best with (mean of 10 seeds). Of the lengths, that is taken whose seeds agree best: the
deviation of their final accuracy is smallest. As many seeds are compared as fit in three minutes.

Writes docs/results/default-study.md; resumes in FOLDER (default: tract-hub-runs/default-study).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd

from tract_hub.studies import table
from tract_hub.studies.machine import machine

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "default-study.md"
WORDS = (
    "--recipe digits --epochs 1 2 3 4 --lr 0.02 0.05 0.1 0.2 0.4 0.8 "
    "--seeds 10 --grid-seeds 10 --lam"
)
SHOWN = {"epochs": "g", "lr": "g", "accuracy": ".1%", "deviation of seeds": ".2%"}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tract-hub-runs/default-study")
    command = [sys.executable, "-m", "tract_hub", "compare", *WORDS.split()]
    subprocess.run([*command, "--out", str(folder)], check=True)
    rows = table.read(folder / "runs.jsonl")
    final = rows[rows["epoch"] == rows["epochs"]].groupby(["epochs", "lr"])["accuracy"]
    grid = final.agg(["mean", "std"]).reset_index().set_axis(list(SHOWN), axis=1)
    best = grid.loc[grid.groupby("epochs")["accuracy"].idxmax()]
    chosen = best.loc[best["deviation of seeds"].idxmin()]
    rule = " ".join((__doc__ or "").split("\n\n")[2].split())
    RESULTS.write_text(
        "# How the default study was chosen\n\n"
        f"{rule}\n\nChosen: {chosen['epochs']:g} epochs, lr {chosen['lr']:g}.\n\n"
        f"## Best rate by length\n\n{shown(best)}\n"
        f"## The whole grid, ordinary training, 10 seeds\n\n{shown(grid)}\n{machine()}\n",
        encoding="utf-8",
    )
    print(shown(best))


def shown(grid: pd.DataFrame) -> str:
    """Return the grid as a table of texts."""
    texts = {name: grid[name].map(f"{{:{form}}}".format) for name, form in SHOWN.items()}
    return table.markdown(pd.DataFrame(texts))


if __name__ == "__main__":
    main()
