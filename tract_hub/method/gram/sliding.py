"""The Gram matrix of a 2-d kernel, without its unfolded input.

Unfold horizontally only: the input becomes a stack of image rows, each of (channel, kernel column)
features at every output column. A window is ``height`` successive rows of that stack, and the
windows of successive output lines share all but ``stride`` of them. So it is enough to multiply the
first ``stride`` rows of each window with the whole window: the product of the kernel rows a and b
at output line y is that of the rows a − ts and b − ts of the window at line y + t.

For a 7×7 kernel of stride 2 that is 2/7 of the multiplications and of the memory.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_hub.method.gram.panels import mirrored
from tract_hub.method.gram.patches import CHUNK_ELEMENTS, output_size
from tract_hub.method.gram.precision import Precision, eager_on_cpu
from tract_hub.method.operations import Convolution, LinearCall

WIDTH = 16
"""Features of a window that a CPU multiplies at a time: part of them takes as long, or longer."""

STACK_ELEMENTS = 5 * 2**17
"""Elements of image rows that a CPU unfolds at a time: 2.5 MiB in float32, for its cache."""


def slides(call: LinearCall) -> bool:
    """Whether a call is one that this file treats: a plain 2-d kernel over a batch of images."""
    convolution = call.convolution
    if convolution is None or len(convolution.kernel) != 2 or call.input.dim() != 4:
        return False
    lines = output_size(convolution, tuple(call.input.shape[2:]))[0]
    plain = convolution.groups == 1 and convolution.dilation == (1, 1)
    return plain and lines >= taps(convolution)


def sliding_gram(call: LinearCall, convolution: Convolution, precision: Precision) -> Tensor:
    """Compute XᵀX, (1, n, n), of a call that ``slides`` and has at least one row."""
    channels = call.input.shape[1]
    lines, width = output_size(convolution, tuple(call.input.shape[2:]))
    stack = call.input.shape[1:3].numel() * width * convolution.kernel[1]
    together = max(1, min(CHUNK_ELEMENTS // stack, precision.block_rows // width))
    chunks = (call.as_used(images).to(precision.products) for images in call.input.split(together))
    sums = (_by_edge(_stack(images, convolution, lines), lines, precision) for images in chunks)
    row = channels * convolution.kernel[1]
    panels = kernel_panels(functools.reduce(torch.add, sums), row, convolution)
    return _as_weight(mirrored(panels), channels, convolution).unsqueeze(0)


def taps(convolution: Convolution) -> int:
    """Lines of ``stride`` image rows that one window reaches over."""
    return math.ceil(convolution.kernel[0] / convolution.stride[0])


@dataclass(frozen=True)
class _Stack:
    """Image rows, unfolded horizontally: a view, of which no more is copied than is multiplied.

    Attributes:
        rows: (image rows, channels, kernel width, batch, output width); zeros below the last.
        lines: of windows.
        step: rows from one window to the next.
        fresh: features of a window's first ``stride`` rows, in the order row, channel, column.
        reach: features to multiply them with: all of the window, and perhaps some below.

    """

    rows: Tensor
    lines: int
    step: int
    fresh: int
    reach: int

    def products(self, first: int, last: int) -> Tensor:
        """Multiply the windows of some lines: (last − first, fresh, reach)."""
        row = self.rows.shape[1:3].numel()
        end = (last - 1) * self.step + math.ceil(self.reach / row)
        copied = self.rows[first * self.step : end].flatten(3).flatten(0, 2).contiguous()
        windows = copied.unfold(0, self.reach, self.step * row)
        return torch.bmm(windows[..., : self.fresh].mT, windows)

    def lines_together(self) -> int:
        """Lines to multiply in one go: as many as the cache of a CPU holds, elsewhere all.

        There memory is fast and calls are dear, and a compiled graph would hold every part.
        """
        if not eager_on_cpu(self.rows):
            return self.lines
        return max(1, STACK_ELEMENTS // (self.step * self.rows.shape[1:].numel()))


def _stack(images: Tensor, convolution: Convolution, lines: int) -> _Stack:
    """(batch, channels, height, width) → windows of the output lines, and taps − 1 more."""
    (height, width), stride = convolution.kernel, convolution.stride[0]
    row = images.shape[1] * width
    multiple = WIDTH if eager_on_cpu(images) else 1
    reach = math.ceil(height * row / multiple) * multiple
    lines += taps(convolution) - 1
    rows = _image_rows(images, convolution, (lines - 1) * stride + math.ceil(reach / row))
    return _Stack(rows, lines, stride, min(stride, height) * row, reach)


def _image_rows(images: Tensor, convolution: Convolution, rows: int) -> Tensor:
    """View as (rows, channels, kernel width, batch, output width); the padding is a copy."""
    ((top, _), (left, right)) = convolution.padding
    below = rows - top - images.shape[2]  # negative: cuts what no window sees
    edges = (left, right, top, below)
    padded = F.pad(images, edges) if any(edges) else images  # no padding would be a copy
    unfolded = padded.unfold(3, convolution.kernel[1], convolution.stride[1])
    return unfolded.permute(2, 1, 4, 0, 3)


def _by_edge(stack: _Stack, lines: int, precision: Precision) -> Tensor:
    """Sum the products that all pairs of kernel rows share: (2 taps − 1, fresh, reach).

    The pairs of tap t take the lines from t to t + ``lines``: those from taps − 1 to ``lines`` are
    in all of them, and are put between the ones above and the ones below.
    """
    cuts, together = (stack.lines - lines, lines), stack.lines_together()
    above, shared, below = [], [], []
    for first in range(0, stack.lines, together):
        products = stack.products(first, min(first + together, stack.lines))
        parts = products.tensor_split([max(cut - first, 0) for cut in cuts])
        above.append(parts[0])
        shared.append(parts[1].sum(0, keepdim=True, dtype=precision.sums))
        below.append(parts[2])
    return torch.cat([*above, functools.reduce(torch.add, shared), *below])


def kernel_panels(by_edge: Tensor, row: int, convolution: Convolution) -> list[Tensor]:
    """Sum the products of each pair of kernel rows, of ``row`` features: one panel of lines a tap.

    ``by_edge`` is (2 taps − 1, fresh features, features).
    """
    height, stride, reach = convolution.kernel[0], convolution.stride[0], taps(convolution)
    panels = []
    for tap in range(reach):
        above = stride * tap * row  # features of the kernel rows above the first of this tap
        fresh = min(stride * row, height * row - above)
        panels.append(by_edge[tap : tap + reach, :fresh, : height * row - above].sum(0))
    return panels


def _as_weight(gram: Tensor, channels: int, convolution: Convolution) -> Tensor:
    """Order features, (kernel row, channel, kernel column), as the flattened weight's."""
    height, width = convolution.kernel
    order = (height, channels, width)
    ordered = gram.unflatten(1, order).unflatten(0, order).permute(1, 0, 2, 4, 3, 5)
    whole: Tensor = ordered.flatten(3).flatten(0, 2)
    return whole
