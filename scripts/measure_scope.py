"""Measure what ``scope="global"`` costs a step of two processes on a CPU.

Writes docs/results/scope.md. The arms take turns, step by step, so that whatever else the machine
does falls on all of them.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import tract_hub
from tract_hub.studies.interleaved import interleave, ratio

MODELS = ("resnet50", "vit_small_patch16_224")
ARMS = ("ordinary", "rank", "global")
PROCESSES, BATCH, WARM_UPS = 2, 8, 2
RESULTS = Path(__file__).parents[1] / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder, arguments.steps), nprocs=PROCESSES)
        times = torch.load(Path(folder) / "times.pt")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "scope.md").write_text(page(times, arguments.steps), encoding="utf-8")


def measure(rank: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=PROCESSES)
    times = {name: of_model(name, steps) for name in MODELS}
    if rank == 0:
        torch.save(times, Path(folder) / "times.pt")
    dist.destroy_process_group()


def of_model(name: str, steps: int) -> dict[str, Any]:
    models = {arm: build(name, arm) for arm in ARMS}
    n = tract_hub.locate(models["ordinary"])[0].in_features
    images = torch.randn(BATCH, 3, 224, 224)
    timers = [partial(step, DistributedDataParallel(model), images) for model in models.values()]
    rounds = interleave(timers, WARM_UPS + steps)[WARM_UPS:]
    return {"n": n, **dict(zip(ARMS, zip(*rounds, strict=True), strict=True))}


def step(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Take one step, forward and backward, and return the seconds."""
    model.zero_grad()
    dist.barrier()
    start = time.perf_counter()
    model(images).square().mean().backward()
    return time.perf_counter() - start


def build(name: str, arm: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name)
    return model if arm == "ordinary" else tract_hub.enable(model, scope=arm)


def page(times: dict[str, dict[str, Any]], steps: int) -> str:
    lines = [
        "# What scope='global' costs",
        f"Forward and backward in {PROCESSES} processes (DistributedDataParallel over gloo, one "
        f"thread each), {BATCH} images of 224 × 224 a process, median of {steps} steps, arms in "
        f"turn; {platform.machine()} CPU, torch {torch.__version__.split('+')[0]}. Ratios are "
        "medians over steps, with quartiles. Written by `python scripts/measure_scope.py`.",
        "| model | n | summed a step | rank / ordinary | global / rank |\n"
        "| --- | --: | --: | --: | --: |",
    ]
    for name, of in times.items():
        kilobytes = (of["n"] ** 2 + 1) * 8 / 1e3
        lines[-1] += (
            f"\n| {name} | {of['n']} | {kilobytes:,.0f} kB "
            f"| {shown(of['rank'], of['ordinary'])} | {shown(of['global'], of['rank'])} |"
        )
    return "\n\n".join(lines) + "\n"


def shown(times: Sequence[float], reference: Sequence[float]) -> str:
    of = ratio(times, reference)
    return f"{of.median:.3f} ({of.first:.3f} to {of.third:.3f})"


if __name__ == "__main__":
    main()
