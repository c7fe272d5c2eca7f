"""Division by the damped Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from tract_hub.method.gram.matrix import Gram
from tract_hub.method.gram.precision import plain_on_cpu, widest_dtype
from tract_hub.method.solve.blocks import divide_by_blocks

LARGE = 256
"""Features from which on blocks are faster than LAPACK."""


def divide_by_gram(gradient: Tensor, gram: Gram, lam: float) -> Tensor:
    """Return ∇W · (XᵀX / rows + λI)⁻¹, the gradient of TrAct.

    Factored by Cholesky in float64 where the device has it: n is small, and the damped matrix of
    smooth images is badly conditioned. Nothing waits for the device.

    A λ too small for the precision of the Gram matrix is raised to its rounding errors: the sum
    may otherwise not be positive definite.

    Args:
        gradient: (out, ...) of ``groups × n`` features in all; any floating dtype.
        gram: the Gram matrix of the rows that the weight was applied to.
        lam: the damping λ.

    Returns:
        The gradient's shape and dtype; NaN throughout a group whose Gram matrix is not finite.

    """
    groups, features, _ = gram.total.shape
    with torch.autocast(gradient.device.type, enabled=False):
        damped, damping = damp(gram, lam)
        rows = gradient.reshape(groups, -1, features).to(damped.dtype)
        solved, definite = _divide(rows, damped)
        solved = solved + _poison(damping, definite)
    return solved.reshape(gradient.shape).to(gradient.dtype)


def _divide(rows: Tensor, damped: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows · damped⁻¹, and whether each matrix was positive definite."""
    large = damped.shape[-1] >= LARGE
    # Blocks are written in place, which no graph of this backward and no transform could follow.
    if large and not torch.is_grad_enabled() and plain_on_cpu(rows) and plain_on_cpu(damped):
        return divide_by_blocks(rows, damped)
    factor, info = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_solve(rows.mT, factor).mT, info == 0


def _poison(damping: Tensor, definite: Tensor) -> Tensor:
    """Return what to add to a result, (groups, 1, 1): 0, or NaN where it is none.

    A factorisation that met a NaN or an overflow leaves finite numbers behind. The trace of a Gram
    matrix, and with it the damping, is not finite where an entry is not: ∞ − ∞, and 0 / 0 where
    the matrix was not positive definite, are NaN.
    """
    return (damping - damping) / definite[:, None, None]


def invert(gram: Gram, lam: float | Tensor) -> Tensor:
    """Return (XᵀX / rows + λI)⁻¹, (groups, n, n), in the widest dtype that the device has.

    For where it can be made before the gradient is there. NaN throughout a group whose Gram matrix
    is not finite; λ is raised as in ``divide_by_gram``. Nothing waits for the device.
    """
    damped, damping = damp(gram, lam)
    factor, info = torch.linalg.cholesky_ex(damped)
    identity = torch.eye(damped.shape[-1], dtype=damped.dtype, device=damped.device)
    halved = torch.linalg.solve_triangular(factor, identity.expand_as(damped), upper=False)
    return torch.baddbmm(_poison(damping, info == 0), halved.mT, halved)


def multiply(gradient: Tensor, inverse: Tensor) -> Tensor:
    """Return ∇W · inverse, of the gradient's shape and dtype, by ``invert``'s result."""
    groups, features, _ = inverse.shape
    with torch.autocast(gradient.device.type, enabled=False):
        product = gradient.reshape(groups, -1, features).to(inverse.dtype) @ inverse
    return product.reshape(gradient.shape).to(gradient.dtype)


def damp(gram: Gram, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return XᵀX / rows + λI, (groups, n, n), and the λ that it took, (groups, 1, 1)."""
    wide = widest_dtype(gram.total.device)
    damping = gram.rounding().to(wide).clamp_min(lam)
    damped = gram.total.to(wide) / max(gram.rows, 1)
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., 0])
    return damped, damping
