"""Symmetric products by oneDNN, on CPUs where it is the fastest at them.

On AMD's processors with AVX-512, MKL uses half of their width; oneDNN, which torch has for
convolutions, all of it. A tensor in oneDNN's layout is the public way there.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_hub.method.gram.precision import Precision, plain_on_cpu

PANEL = 256
"""Lines of a Gram matrix that are computed together: fewer are slower, and so are all."""


def suits(rows: Tensor) -> bool:
    """Whether oneDNN is to multiply: float32 of one group, on a CPU with AVX-512."""
    onednn = torch.backends.mkldnn
    return (
        rows.shape[0] == 1
        and rows.dtype == torch.float32
        and type(rows) is Tensor
        and plain_on_cpu(rows)
        and bool(onednn.is_available() and onednn.enabled)
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def gram_panels(rows: Tensor, precision: Precision) -> list[Tensor]:
    """Compute XᵀX of (1, rows, n) as panels (1, lines, n − start)."""
    features = rows.shape[-1]
    panels = [
        rows.new_zeros(min(PANEL, features - start), features - start, dtype=precision.sums)
        for start in range(0, features, PANEL)
    ]
    for block in rows[0].split(precision.block_rows):
        # oneDNN sums row after row. MKL sums a block in two halves: without them, the error would
        # be larger by two thirds.
        halves = [half.mT.contiguous() for half in block.chunk(2)]
        for panel in panels:
            products = [_product(half, panel.shape) for half in halves]
            panel += functools.reduce(torch.add, products)
    return [panel.unsqueeze(0) for panel in panels]


def _product(columns: Tensor, shape: torch.Size) -> Tensor:
    """Multiply the last features of (n, rows), as many as a panel's columns, by its lines."""
    # Both contiguous: for others, oneDNN has but a plain loop.
    right = columns[-shape[1] :]
    left = right[: shape[0]]
    product: Tensor = F.linear(left.to_mkldnn(), right).to_dense()
    return product
