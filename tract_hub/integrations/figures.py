"""What TrAct does to each first layer, as numbers for a log."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import tract_hub


def measure(model: nn.Module) -> dict[str, float]:
    """Return λ and the norm of the gradient of each first layer, for a log.

    Call it between ``backward()`` and ``zero_grad()``; with ``scope="global"`` after ``finish``.
    It waits for the device, so call it where the loss is logged, not in every step.

    Args:
        model: TrAct is on it.

    Returns:
        For each first layer ``"tract/<layer>/lam"`` and, where its weight has a gradient,
        ``"tract/<layer>/grad_norm"``: the Euclidean norm of the gradient as it is now, in the units
        of loss per weight. Empty where TrAct is off.

    Example:
        >>> loss.backward()
        >>> wandb.log({"loss": loss.item(), **tract_hub.measure(model)})

    """
    return {name: float(value) for name, value in figures(model).items()}


def figures(model: nn.Module) -> dict[str, float | Tensor]:
    """Return what ``measure`` does, with norms as scalar tensors: it does not wait for them."""
    named: dict[str, float | Tensor] = {}
    for stem in tract_hub.status(model):
        layer = f"tract/{stem.weight_name.removesuffix('.weight')}"
        named[f"{layer}/lam"] = stem.lam
        gradient = model.get_parameter(stem.weight_name).grad
        if gradient is not None:
            norm = gradient.detach().norm()
            # The norm of a gradient that FSDP2 shards is a DTensor: all processes add it up.
            named[f"{layer}/grad_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return named
