"""``tract-hub inspect``: the first layers of a model, and what TrAct adds to a training step."""

from __future__ import annotations

import json
import warnings
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import tract_hub
from tract_hub.errors import TractWarning
from tract_hub.locator.search import follow
from tract_hub.method.calls import LinearCall
from tract_hub.method.gram import count_rows
from tract_hub.studies.models import build_model, build_without_weights
from tract_hub.studies.settings import Inspect


def inspect(settings: Inspect) -> None:
    """Print what ``inspect_model`` says of the model of a name."""
    model = build_without_weights(lambda: build_model(settings.model))
    found = {"model": settings.model, **inspect_model(model, settings.batch_size)}
    if settings.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    shapes = ", ".join("×".join(map(str, shape[1:])) for shape in found["inputs"])
    print(f"First layers of {settings.model}, input {shapes}")
    for layer in found["first_layers"]:
        flops, share = tqdm.format_sizeof(layer["flops"]), 100 * layer["share"]
        print(
            f"\n{layer['description']}\n  TrAct adds at most {flops}FLOP to a training step of "
            f"{settings.batch_size} inputs: {share:.2g} %"
        )
    for warning in found["warnings"]:
        print(f"\nWarning: {warning}")


def inspect_model(model: nn.Module, batch: int = 128) -> dict[str, Any]:
    """Locate the first layers of a model, and count what TrAct adds to a training step.

    Returns plain data: the shapes of the ``inputs``; for each of the ``first_layers`` its names,
    its features, the ``flops`` that TrAct adds and their ``share`` of the ordinary step (three
    forwards of a batch of so many inputs); and ``warnings``.

    Example:
        >>> inspect_model(timm.create_model("resnet50"))["first_layers"][0]["weight"]
        'conv1.weight'

    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stems = tract_hub.locate(model)
    said = [str(w.message) for w in caught if issubclass(w.category, TractWarning)]
    attempt = follow(model)
    with FlopCounterMode(display=False) as counter:  # once more, on the inputs that were right
        attempt.again()
    shapes = [list(pixels.shape) for pixels in attempt.example.pixels]
    inputs = batch / shapes[0][0]
    step = 3 * counter.get_total_flops() * inputs
    layers = []
    for stem in stems:
        flops = sum(
            added_flops(layer.call, inputs)
            for layer in attempt.trace.layers
            if layer.call and stem.weight_name in layer.parameters
        )
        layers.append(
            {
                "weight": stem.weight_name,
                "module": stem.module_name,
                "in_features": stem.in_features,
                "description": str(stem),
                "flops": round(flops),
                "share": flops / step if step else 0.0,
            }
        )
        said += [f"{stem.weight_name}: {note}" for note in stem.notes]
    return {"batch_size": batch, "inputs": shapes, "first_layers": layers, "warnings": said}


def added_flops(call: LinearCall, inputs: float) -> float:
    """Count what TrAct adds to one call: at most, as overlapping patches share products.

    With R rows of n features and m outputs: R n k for the Gram matrix of k = min(R, n) sides
    (half of its products, by symmetry), k³ / 3 for its factor, 2 n k m to solve with it. A step has
    so many times the inputs of the traced call.
    """
    outputs = call.weight.shape[1] if call.name == "matmul" else call.weight.shape[0]
    rows = count_rows(call) * inputs
    groups, n, m = call.groups, call.in_features, outputs / call.groups
    k = min(rows, n)
    return groups * (rows * n * k + k**3 / 3 + 2 * n * k * m)
