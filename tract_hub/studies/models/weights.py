"""Weights from a file, for fine-tuning."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tract_hub.errors import ModelError


def load_weights(model: nn.Module, path: Path, name: str) -> str:
    """Load a safetensors file of the same model, in place.

    What the file has in another shape, as a head for other classes, stays fresh.

    Args:
        model: fresh.
        path: of the file.
        name: of the model, for messages.

    Returns:
        What was loaded, in words.

    Raises:
        ModelError: no such file, or it is another model's.

    """
    try:
        found = load_file(path.expanduser())
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"--weights {path} is no safetensors file ({error}): pass one that --save-weights or "
            "save_pretrained wrote"
        ) from error
    own = model.state_dict()
    strange = sorted(set(own) ^ set(found))
    if strange:
        raise ModelError(
            f"--weights {path.name} is of another model than {name}: {len(strange)} names differ, "
            f"such as {strange[0]}; pass weights of {name}"
        )
    fresh = [key for key, value in found.items() if value.shape != own[key].shape]
    model.load_state_dict({key: found[key] for key in own if key not in fresh}, strict=False)
    return f"weights from {path.name}" + (f", but for {', '.join(fresh)}" if fresh else "")
