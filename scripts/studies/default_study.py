"""Choose the default study of `tract-hub compare`: by ordinary training alone, TrAct is not run.

    python scripts/studies/default_study.py [FOLDER]

For each image size and length, the learning rate is the one that ordinary training ends best with
(mean of 3 seeds). Of these settings, that is taken whose final accuracy is least noisy for the
error that is left: √(variance between seeds + p (1 − p) / test images) / (1 − p), p the mean
accuracy. A change of the error by a given share then takes the fewest seeds to show.

Writes docs/results/default-study.md; resumes in FOLDER (default: tract-hub-runs).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd

from tract_hub.studies import table
from tract_hub.studies.machine import machine

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "default-study.md"
RATES = "0.02 0.05 0.1 0.2 0.4 0.8 1.6".split()
SIZES, LENGTHS = (8, 16), "2 3 4"
"""At 32 pixels, 20 seeds of 2 epochs would take more than 3 minutes on 2 cores."""
TEST_IMAGES = 450


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tract-hub-runs")
    lines = []
    for size in SIZES:
        out = folder / f"default-{size}"
        words = f"--recipe digits --image-size {size} --epochs {LENGTHS} --seeds 3 --lam"
        rates = ["--lr", *RATES]
        command = [sys.executable, "-m", "tract_hub", "compare", *words.split(), *rates]
        subprocess.run([*command, "--out", str(out)], check=True)
        rows = table.read(out / "runs.jsonl")
        final = rows[(rows["epoch"] == rows["epochs"]) & (rows["arm"] == "ordinary")]
        for (epochs, lr), accuracy in final.groupby(["epochs", "lr"])["accuracy"]:
            mean, between = accuracy.mean(), accuracy.var()
            noise = (between + mean * (1 - mean) / TEST_IMAGES) ** 0.5 / (1 - mean)
            lines.append((size, epochs, lr, mean, between**0.5, noise))
    columns = ["image size", "epochs", "lr", "accuracy", "deviation of seeds", "noise"]
    grid = pd.DataFrame(lines, columns=columns)
    best = grid.loc[grid.groupby(["image size", "epochs"])["accuracy"].idxmax()]
    chosen = best.loc[best["noise"].idxmin()]
    rule = " ".join((__doc__ or "").split("\n\n")[2].split())
    texts = dict.fromkeys(("accuracy", "deviation of seeds"), ".1%") | {"noise": ".2f"}

    def shown(frame: pd.DataFrame) -> str:
        cells = frame.astype(object).copy()
        for name in frame:
            cells[name] = [format(value, texts.get(name, "g")) for value in frame[name]]
        return table.markdown(cells)

    RESULTS.write_text(
        "# How the default study was chosen\n\n"
        f"{rule}\n\nChosen: {chosen['image size']:g} pixels, {chosen['epochs']:g} epochs, "
        f"lr {chosen['lr']:g}.\n\n## Best rate by size and length\n\n{shown(best)}\n"
        f"## The whole grid, ordinary training, 3 seeds\n\n{shown(grid)}\n{machine()}\n",
        encoding="utf-8",
    )
    print(shown(best))


if __name__ == "__main__":
    main()
