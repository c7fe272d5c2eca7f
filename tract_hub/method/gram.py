"""The Gram matrix of a layer's input: what the gradient is divided by."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tract_hub.method.operations import LinearCall
from tract_hub.method.patches import count_rows, row_chunks
from tract_hub.method.precision import Precision, precision_for, widest
from tract_hub.method.sliding import slides, sliding_gram

LARGE = 256
"""Features from which on the symmetry of the Gram matrix saves more than smaller products cost."""

ROUNDING = 8
"""Rounding errors of a Gram matrix, in units of eps × trace."""

ROUGH = 64
"""Times its rounding errors that the damping is, at least, where float32 is good enough."""

PANEL = 128
"""Lines of a large Gram matrix that are computed together."""


@dataclass(frozen=True)
class Gram:
    """Sum of xxᵀ over the rows x of one or several inputs.

    Attributes:
        total: (groups, n, n), float64 where the device has it; not divided by the rows.
        rows: how many rows were summed.
        eps: the rounding unit of the products that were summed.

    """

    total: Tensor
    rows: int
    eps: float

    def rounding(self) -> Tensor:
        """Bound the rounding errors of each group's XᵀX / rows, as an eigenvalue: (groups, 1, 1).

        Errors of a product that add up, at worst, are as large as the trace allows. The factor is
        twice what any of the inputs tried has shown: photographs, ramps, constants, noise.
        """
        trace = self.total.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (ROUNDING * self.eps / max(self.rows, 1) * trace)[:, None, None]

    def __add__(self, other: Gram) -> Gram:
        total, rows = self.total + other.total, self.rows + other.rows
        return Gram(total, rows, max(self.eps, other.eps))


def gram_of(call: LinearCall, lam: float) -> Gram:
    """Compute XᵀX of the unfolded input of one call, outside autograd and autocast.

    The unfolded input exists in pieces only, so the memory does not grow with the batch. On a CPU,
    where looking at a number costs nothing, a float32 sum too rough for the damping λ is taken
    again in float64.
    """
    rows = count_rows(call)
    precision = precision_for(call, rows)
    gram = Gram(_total(call, rows, precision), rows, precision.eps)
    if precision.can_widen and bool((ROUGH * gram.rounding() > lam).any()):
        wide = widest(rows)
        return Gram(_total(call, rows, wide), rows, wide.eps)
    return gram


def _total(call: LinearCall, rows: int, precision: Precision) -> Tensor:
    convolution = call.convolution
    with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
        if convolution is None or not rows or not slides(call) or _symmetry_saves_more(call):
            return _summed(call, precision)
        return sliding_gram(call, convolution, precision)


def _symmetry_saves_more(call: LinearCall) -> bool:
    """Whether windows share nothing, and the matrix is large."""
    convolution = call.convolution
    shares = convolution is not None and convolution.kernel[0] > convolution.stride[0]
    return not shares and call.in_features >= LARGE


def _summed(call: LinearCall, precision: Precision) -> Tensor:
    panels: list[Tensor] = []
    for piece in row_chunks(call):
        added = _panels(piece.to(precision.products), precision)
        panels = [a + b for a, b in zip(panels, added, strict=True)] if panels else added
    return _mirrored(panels)


def _panels(rows: Tensor, precision: Precision) -> list[Tensor]:
    """XᵀX of (groups, rows, n) in panels of successive lines, each from its diagonal block on."""
    starts = range(0, rows.shape[-1], PANEL) if rows.shape[-1] >= LARGE else (0,)
    width = PANEL if len(starts) > 1 else rows.shape[-1]
    return [_product(rows[..., s : s + width], rows[..., s:], precision) for s in starts]


def _mirrored(panels: list[Tensor]) -> Tensor:
    """Fill in what is left of the diagonal blocks."""
    lines = []
    for i, panel in enumerate(panels):
        begins = panels[0].shape[-1] - panel.shape[-1]
        left = [
            above[..., begins - start :][..., : panel.shape[-2]].mT
            for above, start in zip(panels[:i], range(0, begins, PANEL), strict=True)
        ]
        lines.append(torch.cat([*left, panel], dim=-1))
    return torch.cat(lines, dim=-2)


def _product(left: Tensor, right: Tensor, precision: Precision) -> Tensor:
    """LeftᵀRight of (groups, rows, n) and (groups, rows, m), block by block."""
    block = precision.block_rows
    whole = left.shape[1] // block * block if block else 0
    parts = []
    if whole:
        blocks = [rows[:, :whole].unflatten(1, (-1, block)) for rows in (left, right)]
        parts.append((blocks[0].mT @ blocks[1]).sum(1, dtype=precision.sums))
    if whole < left.shape[1] or not parts:
        parts.append((left[:, whole:].mT @ right[:, whole:]).to(precision.sums))
    total: Tensor = functools.reduce(torch.add, parts)
    return total
