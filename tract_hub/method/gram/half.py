"""The Gram matrix of half-precision rows, by the matrix units of a GPU.

Products of two bfloat16 or float16 numbers are exact in float32, in which the units sum them. They
cut rather than round as they sum, so only ``block_rows`` rows are left to them at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tract_hub.method.gram.patches import row_chunks
from tract_hub.method.gram.precision import Precision
from tract_hub.method.gram.strips import product, strip_gram, suits_strips
from tract_hub.method.operations import LinearCall
from tract_hub.method.streams import Relay

CHUNK_ELEMENTS = 24 * 2**20
"""Unfolded elements in a buffer: 48 MiB, so that few launches multiply a large batch."""


def half_gram(call: LinearCall, precision: Precision) -> tuple[Tensor, torch.cuda.Event | None]:
    """Compute XᵀX of a call with at least one row, beside the stream that trains.

    Returns:
        (groups, n, n) in float64, and what says when it may be read on another stream than the one
        beside; None where it was computed in line.

    """
    relay = Relay(call.input.device)
    if call.convolution is not None and suits_strips(call):
        total = strip_gram(call, call.convolution, precision, relay, CHUNK_ELEMENTS)
        return total, relay.ready
    sums: list[Tensor] = []
    for rows in row_chunks(call, CHUNK_ELEMENTS, partial(relay.copy, dtype=precision.products)):
        with relay.beside():
            added = map(_summed, _blocks(rows, precision.block_rows))
            sums = [functools.reduce(torch.Tensor.add_, [*sums, *added])]
    return sums[0], relay.ready


def _blocks(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Split (groups, rows, n) into (groups, blocks, about ``size`` rows, n), and what is over."""
    count = rows.shape[1]
    least = math.ceil(count / size)
    fits = (count // blocks for blocks in range(least, 2 * least) if count % blocks == 0)
    size = next(fits, size)
    whole = count // size * size
    if whole:
        yield rows[:, :whole].unflatten(1, (-1, size))
    if whole < count:
        yield rows[:, whole:].unsqueeze(1)


def _summed(blocks: Tensor) -> Tensor:
    """(groups, blocks, rows, n) → (groups, n, n) in float64."""
    flat = blocks.flatten(0, 1)
    products = product(flat, flat).unflatten(0, tuple(blocks.shape[:2]))
    total: Tensor = products.sum(1).double()
    return total
