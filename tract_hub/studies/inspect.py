"""Say what the first layers of a model are, and what TrAct would cost there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tract_hub.locator.locate import locate, stems_of
from tract_hub.locator.search import follow
from tract_hub.locator.trace import Trace
from tract_hub.method.count import gram_operations, solve_operations
from tract_hub.stem import Stem
from tract_hub.studies.models.named import model_named

FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP")
BYTES = ("B", "KiB", "MiB", "GiB")


@dataclass(frozen=True)
class Cost:
    """What TrAct adds to one training step.

    Attributes:
        flops: of the Gram matrix, its factor and the two triangular solves.
        share: of the ordinary step's FLOPs, taken as three forwards.
        bytes: of the Gram matrix and its factor, in float64.

    """

    flops: int
    share: float
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What there is to say about a model.

    Attributes:
        stems: its first layers.
        costs: of each of them.
        inputs: shapes of the pixels that the FLOPs are for.
        warnings: what a user should know.

    """

    stems: tuple[Stem, ...]
    costs: tuple[Cost, ...]
    inputs: tuple[tuple[int, ...], ...]
    warnings: tuple[str, ...]


def inspect(model: str, as_json: bool) -> None:
    """Print what ``inspect_model`` says about the model of a name, in words or as JSON."""
    found = inspect_model(model_named(model))
    if as_json:
        print(json.dumps({"model": model, **as_data(found)}, indent=2, ensure_ascii=False))
        return
    print("\n".join(_lines(model, found)))


def inspect_model(model: nn.Module) -> Inspection:
    """Locate the first layers of a model and count what TrAct would add to its training step.

    Raises:
        TractError: there is none that can be treated exactly.

    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stems = locate(model)
    said = [str(w.message) for w in caught if w.category.__name__ == "TractWarning"]
    said += [f"{stem.weight_name}: {note}" for stem in stems for note in stem.notes]
    attempt = follow(model)
    with FlopCounterMode(display=False) as counter:  # once more, on the inputs that were right
        attempt.again()
    step = 3 * counter.get_total_flops()
    shapes = tuple(tuple(pixels.shape) for pixels in attempt.example.pixels)
    plain = stems_of(model, attempt)
    costs = tuple(_cost(stem.weight_name, attempt.trace, step) for stem in plain)
    return Inspection(stems, costs, shapes, tuple(said))


def _cost(weight_name: str, trace: Trace, step: int) -> Cost:
    """Count a Gram matrix for each use of the weight, and one solve."""
    calls = [c.call for c in trace.layers if c.call and weight_name in c.parameters]
    flops = sum(map(gram_operations, calls)) + solve_operations(calls[0])
    matrix = calls[0].groups * calls[0].in_features ** 2
    return Cost(flops, flops / step if step else 0.0, 2 * 8 * matrix)


def as_data(found: Inspection) -> dict[str, Any]:
    """Return an inspection as plain data, for JSON."""
    layers = []
    for stem, cost in zip(found.stems, found.costs, strict=True):
        layer = {
            "weight": stem.weight_name,
            "module": stem.module_name,
            "class": type(stem.module).__name__,
            "operation": stem.operation,
            "geometry": stem.geometry,
            "in_features": stem.in_features,
            "path": list(stem.path),
            "derived": stem.derived,
            "uses": stem.uses,
            "reason": stem.reason,
            "cost": asdict(cost),
        }
        layers.append(layer)
    return {
        "first_layers": layers,
        "inputs": [list(shape) for shape in found.inputs],
        "warnings": list(found.warnings),
    }


def _lines(name: str, found: Inspection) -> Iterator[str]:
    shapes = ", ".join("×".join(map(str, shape)) for shape in found.inputs)
    yield f"First layers of {name}, input {shapes}"
    for stem, cost in zip(found.stems, found.costs, strict=True):
        yield ""
        yield stem.weight_name
        yield f"  layer   {_in_words(stem)}; {stem.in_features} input features"
        yield f"  pixels  reach it {_shortened(stem.path)}"
        flops, share = _scaled(cost.flops, 1000, FLOPS), f"{100 * cost.share:.2g} %"
        yield (
            f"  TrAct   adds {flops} to a training step on this input ({share}); "
            f"its matrices take {_scaled(cost.bytes, 1024, BYTES)}"
        )
    for warning in found.warnings:
        yield f"\nWarning: {warning}"


def _in_words(stem: Stem) -> str:
    kind = type(stem.module).__name__
    if kind.lower() != stem.operation:
        kind += f" ({stem.operation})"
    words = f"{kind} {stem.geometry}".rstrip()
    if stem.derived:
        words += ", derived weight"
    return words if stem.uses == 1 else f"{words}, used {stem.uses} times"


def _shortened(path: tuple[str, ...], most: int = 8) -> str:
    if len(path) > most:
        path = (*path[: most // 2], f"… {len(path) - most} more …", *path[-most // 2 :])
    return f"through {' → '.join(path)}" if path else "directly"


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    """Write a count in the smallest unit that leaves it below the base, or in the largest."""
    smaller, largest = units[:-1], units[-1]
    for unit in smaller:
        if count < base:
            return f"{count:.3g} {unit}"
        count /= base
    return f"{count:.3g} {largest}"
