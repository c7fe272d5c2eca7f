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

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_hub.method.operations import Convolution, LinearCall
from tract_hub.method.panels import mirrored
from tract_hub.method.patches import CHUNK_ELEMENTS, output_size
from tract_hub.method.precision import Precision


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
    together = min(CHUNK_ELEMENTS // stack, precision.block_rows // width)
    chunks = (
        call.as_used(images).to(precision.products) for images in call.input.split(max(1, together))
    )
    sums = (_by_edge(_products(images, convolution, lines), lines, precision) for images in chunks)
    row = channels * convolution.kernel[1]
    panels = kernel_panels(functools.reduce(torch.add, sums), row, convolution)
    return _as_weight(mirrored(panels), channels, convolution).unsqueeze(0)


def taps(convolution: Convolution) -> int:
    """Lines of ``stride`` image rows that one window reaches over."""
    return -(-convolution.kernel[0] // convolution.stride[0])


def _products(images: Tensor, convolution: Convolution, lines: int) -> Tensor:
    """(batch, channels, height, width) → (lines + taps − 1, fresh features, features).

    Features are in the order kernel row, channel, kernel column; the fresh ones are those of the
    first ``stride`` kernel rows. The lines after the last output line have zeros below.
    """
    height, stride = convolution.kernel[0], convolution.stride[0]
    row = images.shape[1] * convolution.kernel[1]
    stack = _image_rows(images, convolution, (lines + taps(convolution) - 2) * stride + height)
    windows = stack.unfold(0, height * row, stride * row)
    return torch.bmm(windows[..., : min(stride, height) * row].mT, windows)


def _image_rows(images: Tensor, convolution: Convolution, rows: int) -> Tensor:
    """(batch, channels, height, width) → (rows × channels × kernel width, batch × output width)."""
    ((top, _), (left, right)) = convolution.padding
    below = rows - top - images.shape[2]  # negative: cuts what no window sees
    edges = (left, right, top, below)
    padded = F.pad(images, edges) if any(edges) else images  # no padding would be a copy
    unfolded = padded.unfold(3, convolution.kernel[1], convolution.stride[1])
    stack: Tensor = unfolded.permute(2, 1, 4, 0, 3).flatten(3).flatten(0, 2).contiguous()
    return stack


def _by_edge(products: Tensor, lines: int, precision: Precision) -> Tensor:
    """Sum what all pairs of kernel rows share: (lines + taps − 1, …) → (2 taps − 1, …).

    The pairs of tap t take the lines from t to t + lines: those from taps − 1 to ``lines`` are in
    all of them, and are put between the ones above and the ones below.
    """
    extra = products.shape[0] - lines
    shared = products[extra:lines].sum(0, keepdim=True, dtype=precision.sums)
    return torch.cat([products[:extra], shared, products[lines:]])


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
