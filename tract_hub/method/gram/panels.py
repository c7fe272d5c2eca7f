"""Symmetric products, of which only the half above the diagonal is computed.

The lines of the matrix are taken in panels of successive ones. A panel reaches from its diagonal
block to the last column, so that its shape tells where it begins.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tract_hub.method.gram import onednn
from tract_hub.method.gram.precision import Precision

LARGE = 256
"""Features from which on the symmetry of the Gram matrix saves more than smaller products cost."""

PANEL = 128
"""Lines of a large Gram matrix that are computed together."""


def gram_panels(rows: Tensor, precision: Precision) -> list[Tensor]:
    """Compute XᵀX of (groups, rows, n): one panel where n is small."""
    features = rows.shape[-1]
    if features >= LARGE and onednn.suits(rows):
        return onednn.gram_panels(rows, precision)
    height = PANEL if features >= LARGE else max(features, 1)
    return [
        _product(rows[..., start : start + height], rows[..., start:], precision)
        for start in range(0, max(features, 1), height)
    ]


def mirrored(panels: list[Tensor]) -> Tensor:
    """Join panels (..., lines, n − start) of a symmetric matrix: (..., n, n)."""
    first = panels[0]
    features = first.shape[-1]
    whole = first.new_empty(*first.shape[:-2], features, features)
    for panel in panels:
        start = features - panel.shape[-1]
        end = start + panel.shape[-2]
        whole[..., start:end, start:] = panel
        whole[..., end:, start:end] = panel[..., panel.shape[-2] :].mT
    return whole


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
