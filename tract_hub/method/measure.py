"""What a division by the Gram matrix did to one gradient, in four numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from tract_hub.method.gram.matrix import Gram
from tract_hub.method.solve.divide import damp

QUANTITIES = ("grad_norm_before", "grad_norm_after", "gram_condition", "damping")
"""Norm of the ordinary gradient and of TrAct's; condition number (spectral) of the damped Gram
matrix, the largest of all groups; and the damping: λ, or what it was raised to."""


def new_probe(device: torch.device) -> Tensor:
    """Make a leaf whose gradient becomes what ``measure`` returned, summed over all uses.

    A gradient of a leaf is the one thing that leaves a backward in every way to run it: eager,
    compiled, checkpointed.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(len(QUANTITIES) + 1, dtype=dtype, device=device, requires_grad=True)


def read_probe(probe: Tensor) -> dict[str, float]:
    """Return the mean of each quantity over the uses; empty where no backward came by.

    Waits for the device.
    """
    if probe.grad is None:
        return {}
    *sums, uses = probe.grad.tolist()
    return {name: value / uses for name, value in zip(QUANTITIES, sums, strict=True)}


def measure(before: Tensor, after: Tensor, gram: Gram, lam: float) -> Tensor:
    """Return the quantities and a 1 that counts this use, (5,); NaN where they have no value.

    In float64 where the device has it.
    """
    damped, damping = damp(gram, lam)
    norms = [gradient.to(damped.dtype).norm() for gradient in (before, after)]
    values = [*norms, _condition(damped), damping.max()]
    return torch.stack([*values, torch.ones_like(values[0])])


def _condition(matrix: Tensor) -> Tensor:
    """The largest condition number of symmetric positive definite matrices (groups, n, n)."""
    sound = matrix.isfinite().all()
    device = matrix.device
    if device.type == "mps":  # it has no eigenvalues
        matrix = matrix.cpu()
    matrix = torch.where(sound.to(matrix.device), matrix, torch.zeros_like(matrix))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    worst = (eigenvalues[:, -1] / eigenvalues[:, 0]).max().to(device)
    return torch.where(sound, worst, torch.nan)
