"""Division by a large positive definite matrix, in blocks of lines and columns, on a CPU.

LAPACK's Cholesky factorisation and its triangular solves run at a third and two thirds of the speed
of plain products, and torch's zeroing of the other triangle takes as long as the factorisation.
Here only the diagonal blocks are factored and inverted; the rest is products. The rows to divide
are lines below the matrix, so that its factorisation solves the first of two triangular systems.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 96
"""Lines of a block: no power of two, at which LAPACK and torch are slow."""


def divide_by_blocks(rows: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows · matrix⁻¹, and whether each matrix was positive definite.

    Args:
        rows: (groups, any, n).
        matrix: (groups, n, n), of which the half below the diagonal is read.

    """
    work = torch.cat([matrix, rows], dim=1)
    features = matrix.shape[-1]
    starts = range(0, features, BLOCK)
    factored = [_factor(work, start, min(start + BLOCK, features)) for start in starts]
    inverses, definite = zip(*factored, strict=True)
    divided = work[:, features:]
    for start, inverse in zip(reversed(starts), reversed(inverses), strict=True):
        end = start + inverse.shape[-1]
        factor = work[:, end:features, start:end]
        due = torch.baddbmm(divided[..., start:end], divided[..., end:], factor, alpha=-1)
        divided[..., start:end] = due @ inverse
    return divided, torch.stack(definite).all(0)


def _factor(work: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Put the next columns of the factor in place, below their diagonal block.

    Returns:
        The inverse of the diagonal block, and whether there is one.

    """
    done, here = work[:, start:, :start], work[:, start:end, :start]
    due = torch.baddbmm(work[:, start:, start:end], done, here.mT, alpha=-1)
    factor, info = torch.linalg.cholesky_ex(due[:, : end - start])
    one = torch.eye(end - start, dtype=work.dtype, device=work.device)
    inverse = torch.linalg.solve_triangular(factor, one, upper=False)
    work[:, end:, start:end] = due[:, end - start :] @ inverse.mT
    return inverse, info == 0
