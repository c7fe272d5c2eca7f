"""What TrAct does to each first layer, as numbers for a log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import tract_hub
from tract_hub.attach import Status


def measure(model: nn.Module) -> dict[str, float]:
    """Return λ and the norm of the gradient of each first layer, for a log.

    Call it between ``backward()`` and ``zero_grad()``; with ``scope="global"`` after ``finish``.
    It waits for the device, so call it where the loss is logged, not in every step.

    Args:
        model: an enabled model.

    Returns:
        For each first layer ``"tract/<layer>/lam"`` and, if its weight has a gradient,
        ``"tract/<layer>/grad_norm"``: the Euclidean norm of the gradient as it is now, in units of
        the loss per unit of the weight. Empty if TrAct is off.

    Example:
        >>> loss.backward()
        >>> wandb.log({"loss": loss.item(), **tract_hub.measure(model)})

    """
    stems = tract_hub.status(model)
    return figures(stems, gradient_norms(model, [stem.weight_name for stem in stems]))


def gradient_norms(model: nn.Module, weights: Iterable[str]) -> dict[str, Tensor]:
    """Return the norms of parameters' gradients as they are now, () each, by their names."""
    norms = {}
    for name in weights:
        gradient = model.get_parameter(name).grad
        if gradient is not None:
            norm = gradient.detach().norm()
            # The norm of a gradient that FSDP2 shards is a DTensor: all processes add it up.
            norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms


def figures(stems: Status, norms: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what ``measure`` does; waits for the device."""
    named = {}
    for stem in stems:
        layer = f"tract/{stem.weight_name.removesuffix('.weight')}"
        named[f"{layer}/lam"] = stem.lam
        if stem.weight_name in norms:
            named[f"{layer}/grad_norm"] = float(norms[stem.weight_name])
    return named
