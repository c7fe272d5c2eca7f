"""The half hour on a GPU, in one command; the same command again goes on where it stopped.

    python scripts/gpu/run.py --data path/to/cifar10 [--minutes 9] [--out docs/results/gpu]
    python scripts/gpu/run.py --smoke     # the same on a CPU, with tiny models and data

Install the package with its extras test and bench first; `datasets` is for the training alone.
In order: the GPU tests; what TrAct costs (eager, without autocast beside torch_tract, compiled);
CIFAR-10 by the paper's recipes. Rows are written as they come, to files of JSON lines; the page
README.md after each part. Remove a file to have its part done again.
"""

import argparse
import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import costs
import torch
import training

from tract_hub.studies import table
from tract_hub.studies.machine import machine

ROOT = Path(__file__).parents[2]
RESERVE = {False: 45.0, True: 120.0}  # seconds left to begin a cell of costs: eager, compiled
TEST_SHARE = 0.6  # of the time, for the GPU tests: one that hangs must not take all
TAIL = 60.0  # seconds before the end at which trainings stop, as compiling knows no end


def main(arguments: list[str] | None = None) -> int:
    """Do what there is time for. Return 0 if that was all, 3 if not, 1 if tests failed."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--data", default="", help="CIFAR-10; without, nothing is trained")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it stops")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/gpu")
    parser.add_argument("--smoke", action="store_true", help="tiny models and data on a CPU")
    given = parser.parse_args(arguments)
    end = time.monotonic() + 60 * given.minutes
    if not (given.smoke or torch.cuda.is_available()):
        parser.error("there is no GPU here: --smoke tries the command without one")
    device = torch.device("cpu" if given.smoke else "cuda")
    card = "a CPU" if given.smoke else name_of_card()
    test(given.out, card, end)
    done = measure(given.out, device, card, given.smoke, end)
    write_page(given.out, card, given)
    for settings in training.studies(given.data, given.out, given.smoke):
        if given.data or given.smoke:
            done = training.train_all(settings, given.smoke, end - TAIL) and done
            write_page(given.out, card, given)
    print("all is done" if done else "there is more: run the same command again", "→", given.out)
    failed = any(row["failed"] for row in table.rows_of(given.out / "tests.jsonl"))
    return 1 if failed else 0 if done else 3


def test(out: Path, card: str, end: float) -> None:
    """Run the GPU tests once a card."""
    path, began = out / "tests.jsonl", time.monotonic()
    if any(row["card"] == card for row in table.rows_of(path)):
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    log, limit = out / "tests.log", max(1.0, TEST_SHARE * (end - began))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=limit)
    said = log.read_text()
    last = (said.strip().splitlines() or [""])[-1]
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    if not counts:
        failed.append("they did not end, see tests.log")
    table.append(path, {"card": card, **counts, "failed": failed})
    print(f"GPU tests: {last}", flush=True)


def measure(out: Path, device: torch.device, card: str, smoke: bool, end: float) -> bool:
    """Measure what is not measured yet of the cost table; return whether all is."""
    path = out / "costs.jsonl"
    if not any(row["card"] == card for row in table.rows_of(out / "peaks.jsonl")):
        table.append(out / "peaks.jsonl", costs.peak(device, card, smoke))
    for cell in costs.cells(smoke):
        names = ("card", "arm", "case", "precision", "compiled")
        done = {tuple(row[name] for name in names) for row in table.rows_of(path)}
        if (card, "tract_hub", *cell) in done:
            continue
        if not smoke and time.monotonic() + RESERVE[cell[2]] > end:
            return False
        began = time.monotonic()
        costs.measure(cell, path, device, card, smoke)
        torch.cuda.empty_cache()
        print(f"cost of {cell}: {time.monotonic() - began:.0f} s", flush=True)
    return True


def name_of_card() -> str:
    """Return the GPU's name, with its driver and the CUDA version of torch."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    name, cuda = torch.cuda.get_device_name(), torch.version.cuda
    return f"{name} (driver {driver}, CUDA {cuda}, torch {torch.__version__})"


def write_page(out: Path, card: str, given: argparse.Namespace) -> None:
    """Write the page of what there is."""
    trial = "A trial with tiny models and data: its figures mean nothing. " if given.smoke else ""
    text = f"# On a GPU\n\n{trial}Last on {card}; {machine()}.\n\n## Tests\n\n"
    for row in table.rows_of(out / "tests.jsonl"):
        counts = ", ".join(f"{row[k]} {k}" for k in ("passed", "skipped", "error") if k in row)
        text += f"{row['card']}: {counts or 'none ran'}, {len(row['failed'])} failed.\n\n"
        text += "".join(f"- {name}\n" for name in row["failed"]) + "\n" * bool(row["failed"])
    text += "## Cost of a step\n\nForward and backward, channels_last, in turns. Kernels: sum over "
    text += "a step. Floor: of the Gram matrix, by the rates measured here.\n\n"
    rows, peaks = (table.rows_of(out / name) for name in ("costs.jsonl", "peaks.jsonl"))
    text += "".join(costs.tables(rows, peaks))
    for settings in training.studies(given.data, out, given.smoke):
        text += "".join(training.tables(settings, given.smoke))
    table.write_atomically(out / "README.md", text)


if __name__ == "__main__":
    sys.exit(main())
