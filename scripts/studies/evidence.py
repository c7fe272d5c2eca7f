"""Run the comparisons on CIFAR-10 that the pages quote, and write the page of their results.

    python scripts/studies/evidence.py DATA [NAME …]

DATA: CIFAR-10 as a folder or a hub name, such as uoft-cs/cifar10. Each comparison goes on where it
stopped; on one CPU core, all take about a day. Rows, tables and pictures are in
docs/results/evidence, the page is docs/results/studies.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

from tract_hub.studies import table

RESULTS = Path(__file__).parents[2] / "docs" / "results"
RESNET = "--recipe narrow-resnet18 --model-arg width=16 --precision bf16"
SHORT = "--max-train 10000 --epochs 5"
GRID = "--lr 0.1 0.2 0.4"
FEW = f"{SHORT} --grid-seeds 1 --seeds 4"
PIXELS = f"{RESNET} {GRID} {FEW} --damping relative absolute --pixels"
RATES = "--max-train 25000 --grid-seeds 1 --seeds 3 --lr 0.001 0.002"
VIT = f"{RATES} 0.004"
PATCH8 = f"--recipe small-vit --model-arg patch_size=8 --epochs 12 {VIT}"
STUDIES = {
    "length": (
        "How many epochs does TrAct save?",
        f"{RESNET} --lr 0.1 0.2 --epochs 5 10 20 --ordinary-epochs 25 --grid-seeds 1 --seeds 3",
    ),
    "mechanism": (
        "Is it the direction of the gradient or its size?",
        f"{RESNET} {GRID} {SHORT} --grid-seeds 2 --seeds 6 --rescaled --stem-lr 0.5 2 4",
    ),
    "damping": ("Which λ?", f"{RESNET} {GRID} {SHORT} --grid-seeds 2 --seeds 6 --lam 0.1 0.05 0.2"),
    "pixels-unit": ("Pixels from 0 to 1", f"{PIXELS} unit"),
    "pixels-bytes": ("Pixels from 0 to 255", f"{PIXELS} bytes"),
    "no-norm": (
        "A CNN without batch normalisation behind its first layer",
        f"{RESNET.replace('resnet18', 'resnet18-bare')} --lr 0.1 0.2 0.4 0.8 --max-train 10000 "
        "--epochs 5 10 --grid-seeds 1 --seeds 4",
    ),
    "vit-patch8": ("A small ViT, patches of 8 × 8", PATCH8),
    "vit-no-warmup": ("The same without warm-up", f"{PATCH8} --warmup 0"),
    "conv-vit": ("A small ViT with a convolutional stem", f"--recipe conv-vit --epochs 6 12 {VIT}"),
    "vit-patch4": ("A small ViT, patches of 4 × 4", f"--recipe small-vit --epochs 8 {RATES}"),
}
SHOWN = ["arm", "epochs", "ordinary epochs", "seeds", "accuracy", "difference", "epochs to 95%"]


def section(name: str) -> str:
    """Return what the page says of a comparison; nothing where it has not been run."""
    question, words = STUDIES[name]
    folder = RESULTS / "evidence" / name
    if not (folder / "table.csv").exists():
        return ""
    lines = pd.read_csv(folder / "table.csv", dtype=str)
    rows = table.read(folder / "runs.jsonl")
    final = rows[(rows["arm"] == "ordinary") & (rows["epoch"] == rows["epochs"])]
    by_rate = final.pivot_table("accuracy", "seed", ["epochs", "lr"])
    means = by_rate.dropna().mean()  # of the seeds that chose the rate
    rates = ", ".join(f"{lr:g}: {mean:.1%} ({n} epochs)" for (n, lr), mean in means.items())
    machine = json.loads((folder / "timing.json").read_text(encoding="utf-8"))["machine"]
    pictures = [at for at in ("lengths.png", "compare.png") if (folder / at).exists()]
    return (
        f"\n## {question}\n\n{lines['verdict'][0]}\n\n{table.markdown(lines[SHOWN])}\n"
        + "".join(f"![{question}](evidence/{name}/{picture})\n" for picture in pictures)
        + f"\nOrdinary training by learning rate: {rates}.\n"
        + f"\n`tract-hub compare --data … {words}`, {machine}\n"
    )


def main() -> None:
    data, *names = sys.argv[1:]
    for name in names or STUDIES:
        command = [sys.executable, "-m", "tract_hub", "compare", "--data", data]
        out = ["--out", str(RESULTS / "evidence" / name)]
        subprocess.run([*command, *STUDIES[name][1].split(), *out], check=True)
    page = RESULTS / "studies.md"
    head, mark, _ = page.read_text(encoding="utf-8").partition("<!-- comparisons -->\n")
    page.write_text(head + mark + "".join(map(section, STUDIES)), encoding="utf-8")


if __name__ == "__main__":
    main()
