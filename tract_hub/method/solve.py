"""Division by the damped Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from tract_hub.method.gram import Gram

ROUNDING = 8
"""Rounding errors of an accumulated Gram matrix, in units of its dtype's eps × largest entry."""


def divide_by_gram(gradient: Tensor, gram: Gram, lam: float) -> Tensor:
    """Return ∇W · (XᵀX / rows + λI)⁻¹, the gradient of TrAct.

    Factored by Cholesky in float64 where the device has it: n is small, and the damped matrix of
    smooth images is badly conditioned. Nothing waits for the device.

    A λ too small for the precision of the Gram matrix, under 1e-6 of its largest entry in
    float32, is raised to that: the sum may otherwise not be positive definite.

    Args:
        gradient: (out, ...) of ``groups × n`` features in all; any floating dtype.
        gram: the Gram matrix of the rows that the weight was applied to.
        lam: the damping λ.

    Returns:
        The gradient's shape and dtype; NaN throughout a group whose Gram matrix is not finite.

    """
    groups, features, _ = gram.total.shape
    with torch.autocast(gradient.device.type, enabled=False):
        damped, _ = damp(gram, lam)
        factor, info = torch.linalg.cholesky_ex(damped)
        columns = gradient.reshape(groups, -1, features).to(damped.dtype).mT
        solved = torch.cholesky_solve(columns, factor.contiguous()).mT
        # A factorisation that met a NaN or an overflow leaves finite numbers behind: say NaN.
        sound = (info == 0) & damped.isfinite().all(-1).all(-1)
        solved = torch.where(sound[:, None, None], solved, torch.nan)
    return solved.reshape(gradient.shape).to(gradient.dtype)


def damp(gram: Gram, lam: float) -> tuple[Tensor, Tensor]:
    """Return XᵀX / rows + λI, (groups, n, n), and the λ that it took, (groups, 1, 1)."""
    device = gram.total.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    moment = gram.total.to(wide) / max(gram.rows, 1)
    smallest = ROUNDING * torch.finfo(gram.total.dtype).eps
    damping = (moment.amax((-2, -1), keepdim=True) * smallest).clamp_min(lam)
    return moment + damping * torch.eye(moment.shape[-1], dtype=wide, device=device), damping
