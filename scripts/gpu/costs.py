"""What TrAct costs on a card: steps taken in turns, kernels by the profiler, and the floor."""

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import profile

import tract_hub
from tract_hub.errors import first_line
from tract_hub.studies import table
from tract_hub.studies.bench import ARMS, CASES, Case, arms, twin
from tract_hub.studies.models import logits_of
from tract_hub.studies.timing import added, clock, ratios, seconds, take_turns

SMOKE = {"tiny": Case("small-vit", (3, 32, 32), 8, {"img_size": 32, "depth": 1})}
TURN_SECONDS = {"cuda": 8.0, "cpu": 0.5}  # of all turns of a cell
PROFILED = 3  # steps


def cells(smoke: bool) -> list[tuple[str, str, bool]]:
    """Return case, precision and whether it is compiled, the most telling first."""
    # Without autocast for the authors' package: under autocast its convolution does not run.
    ways = [("bf16", False), ("fp32", False), ("bf16", True)]
    return [(name, *way) for way in ways for name in (SMOKE if smoke else CASES["cuda"])]


def measure(
    cell: tuple[str, str, bool], path: Path, device: torch.device, card: str, smoke: bool
) -> None:
    """Measure the arms of a cell, and append a row an arm."""
    name, precision, compiled = cell
    case = (SMOKE if smoke else CASES["cuda"])[name]
    torch.manual_seed(0)
    model, images, labels = case.prepare(device, True)
    steps: dict[str, Callable[[], None]] = {}
    same = {"card": card, "case": name, "batch": case.batch}
    same |= {"precision": precision, "compiled": compiled}
    for arm in [arm for arm in arms() if not (compiled and arm == "torch_tract")]:
        own = ARMS[arm](twin(model))
        if compiled:
            own.compile(backend="aot_eager" if smoke else "inductor")
        step = functools.partial(train_step, own, images, labels, precision)
        try:
            kernels(step, device)
            steps[arm] = step
        except Exception as error:  # of the authors' package, or for want of memory
            table.append(path, same | {"arm": arm, "error": first_line(error)})
    turns = take_turns(steps, device, TURN_SECONDS[device.type])
    found = {arm: kernels(step, device) for arm, step in steps.items()}
    for arm in steps if "ordinary" in steps else ():
        row: dict[str, Any] = same | {
            "arm": arm,
            "turns": len(turns),
            "ms": round(1e3 * statistics.median(turn[arm] for turn in turns), 4),
            "ratio": [round(q, 5) for q in statistics.quantiles(ratios(turns, arm), n=4)],
            "kernel_ms": round(sum(found[arm].values()), 4),
        }
        if arm == "tract_hub":
            more = Counter(found[arm])
            more.subtract(found["ordinary"])
            row["kernels"] = [[k[:90], round(ms, 4)] for k, ms in more.most_common(8)]
            row |= work(model, images)
        table.append(path, row)


def train_step(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> None:
    model.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = logits_of(model(images))
    nn.functional.cross_entropy(logits.float(), labels).backward()


def kernels(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Return the milliseconds of each kernel in a step; on a CPU, those of each operation."""
    with profile() as profiler:  # of all kinds of device that there are
        for _ in range(PROFILED):
            step()
        clock(device)
    kind, total = DeviceType.CPU, "self_cpu_time_total"
    if device.type == "cuda":
        kind, total = DeviceType.CUDA, "self_device_time_total"
    return {
        event.key: getattr(event, total) / PROFILED / 1e3
        for event in profiler.key_averages()
        if event.device_type == kind and not event.is_user_annotation
    }


def work(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return what the Gram matrix needs at least: bytes to read, operations of half a matrix."""
    (stem, *_), shapes = tract_hub.locate(model), []
    hook = stem.module.register_forward_hook(lambda *a: shapes.append(a[2].shape))
    with torch.no_grad():
        model(images[:1])
    hook.remove()
    rows = len(images) * shapes[0][2:].numel()  # of no dimensions: 1
    few, many = sorted((rows, stem.in_features))  # of the two Gram matrices, the smaller
    return {"bytes": 2 * images.numel(), "operations": many * few * (few + 1)}


def peak(device: torch.device, card: str, smoke: bool) -> dict[str, Any]:
    """Measure the card by a product of bfloat16 matrices and by a copy."""
    side, count = (256, 2**20) if smoke else (8192, 2**30)
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    product = min(seconds(lambda: left @ left, device) for _ in range(10))
    copied = min(seconds(source.clone, device) for _ in range(10))
    rates = 2 * side**3 / product / 1e12, 2 * count / copied / 1e9
    return {"card": card, "tflop_s": round(rates[0], 3), "gb_s": round(rates[1], 2)}


def tables(rows: list[dict[str, Any]], peaks: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the page's tables, a card at a time."""
    for at in peaks:
        yield f"{at['card']}: {at['tflop_s']} TFLOP/s (bfloat16), {at['gb_s']} GB/s (copy).\n\n"
        lines = [figures(row, at) for row in rows if row["card"] == at["card"]]
        yield table.markdown(pd.DataFrame(lines).fillna("")) + "\n"


def figures(row: dict[str, Any], at: dict[str, Any]) -> dict[str, str]:
    """Return a row's figures as texts, with the floor by the card's measured rates."""
    texts = {key: str(row[key]) for key in ("case", "batch", "precision", "arm")}
    texts["compiled"] = "yes" if row["compiled"] else "no"
    if "error" in row:
        return texts | {"step": row["error"]}
    texts |= {"step": f"{row['ms']:.4g} ms", "kernels": f"{row['kernel_ms']:.4g} ms"}
    if row["arm"] != "ordinary":
        texts["added (quartiles)"] = added(row["ratio"])
    if row["arm"] == "tract_hub" and row["precision"] == "bf16":
        floor = max(row["bytes"] / at["gb_s"] / 1e6, row["operations"] / at["tflop_s"] / 1e9)
        texts["floor"] = f"{floor:.3f} ms"
    return texts
