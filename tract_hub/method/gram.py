"""The Gram matrix of a layer's input: what the gradient is divided by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tract_hub.method.operations import LinearCall
from tract_hub.method.patches import count_rows, row_chunks
from tract_hub.method.sliding import slides, sliding_gram

LARGE = 256
"""Features from which on the symmetry of the Gram matrix saves more than smaller products cost."""


@dataclass(frozen=True)
class Gram:
    """Sum of xxᵀ over the rows x of one or several inputs.

    Attributes:
        total: (groups, n, n), float32 or float64; not divided by the rows.
        rows: how many rows were summed.

    """

    total: Tensor
    rows: int

    def __add__(self, other: Gram) -> Gram:
        return Gram(self.total + other.total, self.rows + other.rows)


def gram_of(call: LinearCall) -> Gram:
    """Compute XᵀX of the unfolded input of one call, outside autograd and autocast.

    The unfolded input exists in pieces only, so the memory does not grow with the batch.
    """
    rows = count_rows(call)
    dtype = _accumulator(call, rows)
    with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
        if rows and call.convolution is not None and slides(call):
            return Gram(sliding_gram(call, call.convolution, dtype), rows)
        return Gram(_summed(call, dtype), rows)


def _summed(call: LinearCall, dtype: torch.dtype) -> Tensor:
    shape = (call.groups, call.in_features, call.in_features)
    total = torch.zeros(shape, dtype=dtype, device=call.input.device)
    for piece in row_chunks(call):
        total = total + _squared(piece.to(dtype))
    return total


def _squared(rows: Tensor) -> Tensor:
    """XᵀX of (groups, rows, n); a large one in halves, as the lower left is the upper right."""
    features = rows.shape[-1]
    if features < LARGE:
        return rows.mT @ rows
    left, right = rows.tensor_split(2, dim=-1)
    corner = left.mT @ right
    upper = torch.cat([_squared(left), corner], dim=-1)
    return torch.cat([upper, torch.cat([corner.mT, _squared(right)], dim=-1)], dim=-2)


def _accumulator(call: LinearCall, rows: int) -> torch.dtype:
    """float64 for its own kind, and where it is both cheap and needed: fewer rows than features.

    Such a Gram matrix is singular, and the rounding of float32 could outweigh the damping.
    """
    if call.input.dtype == torch.float64:
        return torch.float64
    few = rows < call.in_features and call.input.device.type != "mps"
    return torch.float64 if few else torch.float32
