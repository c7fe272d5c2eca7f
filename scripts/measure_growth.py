"""Measure how the cost of TrAct grows: ``python scripts/measure_growth.py``.

Writes docs/results/growth/: for a convolution alone, the time of the Gram matrix and the solve as
a ratio to its own forward and backward, beside the ratio of the operations that both make. One
thread of the CPU, by the clock of that thread, so that the machine's other work does not count.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from tract_hub.method.count import gram_operations, solve_operations
from tract_hub.method.gram.matrix import gram_of
from tract_hub.method.gram.patches import count_rows
from tract_hub.method.operations import LinearCall, read_call
from tract_hub.method.solve.divide import divide_by_gram
from tract_hub.studies.bench.cases import photographs
from tract_hub.studies.compare.plots import COLOURS
from tract_hub.studies.files import write_atomically
from tract_hub.studies.interleaved import Ratio, interleave, ratio, thread_seconds
from tract_hub.studies.machine import versions

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "growth"
LAM = 0.1
AXES = {
    "batch": "images in a batch",
    "resolution": "side of the image, pixels",
    "kernel": "side of the kernel",
    "channels": "input channels",
}


@dataclass(frozen=True)
class Point:
    """One convolution of 64 outputs and the batch that it meets."""

    batch: int = 4
    resolution: int = 224
    kernel: int = 7
    stride: int = 2
    channels: int = 3

    def call(self) -> LinearCall:
        pictures = -(-self.channels // 3)
        pixels = photographs(self.resolution, self.batch * pictures)
        images = pixels.view(self.batch, 3 * pictures, *pixels.shape[2:])[:, : self.channels]
        weight = torch.randn(64, self.channels, self.kernel, self.kernel) / self.kernel
        padding = self.kernel // 2 if self.kernel > self.stride else 0
        arguments = (images.contiguous(), weight, None, self.stride, padding)
        return read_call(torch.conv2d, arguments, {})


def points() -> Iterator[tuple[str, str, Point]]:
    """Yield the axis, the kind of kernel, and the point."""
    for name, values in {
        "batch": (1, 2, 4, 8, 16, 32),
        "resolution": (32, 64, 128, 224, 384),
        "channels": (1, 3, 6, 12, 24),
    }.items():
        for kind, base in (("7 × 7, stride 2", Point()), ("patches", Point(kernel=16, stride=16))):
            if name != "channels" or kind != "patches":
                for value in values:
                    yield name, kind, dataclasses.replace(base, **{name: value})
    for kernel in (3, 5, 7, 9, 11):
        yield "kernel", "stride 2", Point(kernel=kernel)
    for kernel in (2, 4, 8, 16, 32):
        yield "kernel", "patches", Point(kernel=kernel, stride=kernel)


def operations(call: LinearCall) -> tuple[int, int]:
    """Count floating-point operations: of TrAct, and of the layer's own forward and backward.

    The layer multiplies rows × n × outputs forward, and as much for the gradient of its weight;
    pixels take none.
    """
    own = 4 * count_rows(call) * call.weight.numel()
    return gram_operations(call) + solve_operations(call), own


def keep_memory() -> None:
    """Have glibc give nothing back to the system.

    It learns from what was freed before how large a block it asks the system for each time anew,
    and a layer whose output is such a block takes up to twice as long.
    """
    libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def measure(point: Point, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    call = point.call()
    layer = nn.utils.skip_init(
        nn.Conv2d, point.channels, 64, point.kernel, point.stride, call.convolution.padding[0][0]
    )
    layer.weight.data.copy_(call.weight)
    nn.init.zeros_(layer.bias)
    above = torch.randn_like(layer(call.input))

    def step() -> None:
        layer.zero_grad()
        layer(call.input).backward(above)

    def correction() -> None:
        divide_by_gram(call.weight, gram_of(call, LAM), LAM)

    timers = [thread_seconds(correction), thread_seconds(step)]
    interleave(timers, 1)
    own, ordinary = zip(*interleave(timers, rounds), strict=True)
    ours, theirs = operations(call)
    return {
        **dataclasses.asdict(point),
        "n": call.in_features,
        "rows": count_rows(call),
        "predicted": ours / theirs,
        "measured": dataclasses.asdict(ratio(own, ordinary)),
    }


def draw(results: list[dict[str, Any]]) -> bytes:
    figure = Figure(figsize=(9, 7), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Gram matrix and solve ÷ the layer's own forward and backward")
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, AXES.items(), strict=True):
        here = [result for result in results if result["axis"] == name]
        for i, kind in enumerate(dict.fromkeys(result["kind"] for result in here)):
            _draw_kind(axes, name, [r for r in here if r["kind"] == kind], COLOURS[i + 1])
        values = sorted({result[name] for result in here})
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ratio")
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_kind(axes: Axes, name: str, results: list[dict[str, Any]], colour: str) -> None:
    at = [result[name] for result in results]
    found = [Ratio(**result["measured"]) for result in results]
    spread = [[r.median - r.first for r in found], [r.third - r.median for r in found]]
    kind = results[0]["kind"]
    medians = [r.median for r in found]
    axes.errorbar(at, medians, spread, fmt="o", color=colour, capsize=3, label=f"{kind}: measured")
    predicted = [result["predicted"] for result in results]
    axes.plot(at, predicted, "-", color=colour, label=f"{kind}: operations")


def page(results: list[dict[str, Any]], rounds: int) -> str:
    lines = [
        "# How the cost of TrAct grows",
        "",
        f"Time of the Gram matrix and the solve, divided by that of the layer's own forward and "
        f"backward: a convolution alone, 64 outputs, photographs, one thread of a CPU, float32, "
        f"torch {versions()['torch']}; median of {rounds} rounds taken in turns (quartiles), by "
        "the thread's own clock. Beside it the ratio of the floating-point operations that both "
        "make. Written by `python scripts/measure_growth.py`.",
        "",
        "![Measured ratio and the ratio of operations along four axes](growth.png)",
        "",
        COUNT,
        "",
        WHERE_THEY_PART,
    ]
    for name, label in AXES.items():
        lines += ["", f"## {name.capitalize()}", ""]
        lines += [f"| kernel | {label} | n | rows | operations | measured |"]
        lines += ["|---|--:|--:|--:|--:|--:|"]
        lines += [_line(name, result) for result in results if result["axis"] == name]
    return "\n".join(lines) + "\n"


def _line(name: str, result: dict[str, Any]) -> str:
    found = Ratio(**result["measured"])
    measured = f"{found.median:.3g} ({found.first:.3g} to {found.third:.3g})"
    cells = (result["kind"], result[name], result["n"], result["rows"])
    return f"| {' | '.join(map(str, cells))} | {result['predicted']:.3g} | {measured} |"


COUNT = """## What is counted

With R rows, n features and m outputs the layer makes 4·R·n·m operations: forward and gradient of
the weight. TrAct makes

- for windows that overlap, with height h and stride s: 2·R·n²·s/h, as only the first s kernel rows
  of a window are multiplied with all of it (and ⌈h/s⌉ − 1 lines more at the edge);
- for patches with n < 256: 2·R·n²; from n = 256 on panels of p lines, each from its diagonal block
  on, R·n²·(1 + p/n), where p is 128, or 256 where oneDNN multiplies;
- n³/3 for the Cholesky factor and 2·n²·m for the two triangular solves.

So for large R the ratio is n·s/(2·m·h) for windows and n·(1 + p/n)/(4·m) for patches: flat in
batch and resolution, and proportional to n, times s/h for windows."""

WHERE_THEY_PART = """## Where they part

- From two images on the ratio of the 7 × 7 kernel is nearly flat, as counted, but at 2.4 to 2.9
  times the count: oneDNN convolves at over 200 GFLOP/s on this machine (AVX-512), where MKL
  multiplies lines at 100.
- Small batches, images and kernels cost more. What does not depend on the rows (mirroring,
  ordering, summing the edge lines, calling) is not counted.
- The factor and the solve are in float64, at half the speed of float32 or less, and the Gram matrix
  too where rows are fewer than features: patches of 16 pixels below 768 rows, of 32 pixels always.
  With many rows it is multiplied by oneDNN, and patches come to the count.
- With hardly any rows the count asks too much of TrAct: the layer then waits for memory, and its
  own time is not that of its multiplications.
- Memory that is asked of the system anew costs the layer up to its own time again. The script has
  the allocator keep what was freed, without which the same convolution, 4 images of 224 pixels,
  gave 0.41 on one axis and 0.94 on another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    results = []
    for axis, kind, point in points():
        results.append({"axis": axis, "kind": kind, **measure(point, arguments.rounds)})
        print(_line(axis, results[-1]), flush=True)
        gc.collect()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = {"rounds": arguments.rounds, "versions": versions(), "points": results}
    write_atomically(arguments.out / "growth.json", json.dumps(kept, indent=1) + "\n")
    write_atomically(arguments.out / "growth.md", page(results, arguments.rounds))
    write_atomically(arguments.out / "growth.png", draw(results))


if __name__ == "__main__":
    main()
