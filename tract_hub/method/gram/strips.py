"""The Gram matrix of a 2-d kernel on a GPU, in half precision, without its unfolded input.

As in ``sliding``, the input is unfolded horizontally only, and a window is a slice of what results.
Here the features of a strip, one output column of one image with all image rows, lie side by side:
what one output column needs of an image row is a run of pixels with all their channels, which is
copied as it is, several elements at a time, and the matrix units read it without a transposition.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tract_hub.method.gram.panels import mirrored
from tract_hub.method.gram.patches import output_size
from tract_hub.method.gram.precision import Precision
from tract_hub.method.gram.sliding import kernel_panels, slides, taps
from tract_hub.method.operations import Convolution, LinearCall
from tract_hub.method.streams import Relay

RUN = 8
"""Elements that runs are a multiple of: 16 bytes, without which matrix units are not fed."""

WORDS = {1: torch.int16, 2: torch.int32, 4: torch.int64}
"""What is copied at once, by the number of its half-precision elements."""

WIDE = 128
"""Features that a product takes from as many successive lines as have them, to load less twice."""

MOST_PRODUCTS = 4 * 2**20
"""Elements of the products of all lines, in float32: 16 MiB."""


@dataclass(frozen=True)
class _Plan:
    """Sizes of one computation.

    Attributes:
        run: features of one image row, with what makes them a multiple of ``RUN``.
        width: output columns.
        lines: output lines.
        edges: lines above and below that not all pairs of kernel rows share.
        together: successive lines in one product.
        products: how many products, of how many features by how many.

    """

    run: int
    width: int
    lines: int
    edges: int
    together: int
    products: tuple[int, int, int]

    @classmethod
    def of(cls, images: Tensor, convolution: Convolution) -> _Plan:
        """Plan for images (batch, channels, height, width)."""
        (height, width), stride = convolution.kernel, convolution.stride[0]
        run = math.ceil(width * images.shape[1] / RUN) * RUN
        lines, columns = output_size(convolution, tuple(images.shape[2:]))
        edges, fresh = taps(convolution) - 1, stride * run
        together = max(1, WIDE // fresh)
        count = math.ceil((lines + edges) / together)
        reach = height * run + (together - 1) * fresh
        return cls(run, columns, lines, edges, together, (count, together * fresh, reach))


def suits_strips(call: LinearCall) -> bool:
    """Whether windows overlap from line to line, and their products take little memory."""
    convolution = call.convolution
    if convolution is None or not slides(call) or convolution.kernel[0] <= convolution.stride[0]:
        return False
    return math.prod(_Plan.of(call.input, convolution).products) <= MOST_PRODUCTS


def strip_gram(
    call: LinearCall, convolution: Convolution, precision: Precision, relay: Relay, limit: int
) -> Tensor:
    """Compute XᵀX, (1, n, n) in float64, of a call that ``suits_strips``.

    Args:
        call: with at least one row.
        convolution: its geometry.
        precision: of which ``products`` is a dtype of two bytes.
        relay: takes the strips to where they are multiplied; the result is ready when it is.
        limit: elements of strips in a buffer, about.

    """
    plan = _Plan.of(call.input, convolution)
    source = _Source(call.input, convolution, plan, precision, limit)
    sums: list[Tensor] = []
    for chunk in source.chunks():
        strips = source.strips(chunk, relay)
        with relay.beside():
            windows = strips.unfold(1, plan.products[2], plan.products[1]).movedim(1, 0)
            added = product(windows[..., : plan.products[1]], windows)
            sums = [functools.reduce(torch.Tensor.add_, [*sums, added])]
    with relay.beside():
        panels = kernel_panels(_by_edge(sums[0], plan), plan.run, convolution)
        return _as_weight(mirrored(panels), call.input.shape[1], convolution).unsqueeze(0)


def product(left: Tensor, right: Tensor) -> Tensor:
    """LeftᵀRight of half-precision (batch, rows, n) and (batch, rows, m), in float32."""
    if left.device.type == "cuda":
        return torch.bmm(left.mT, right, out_dtype=torch.float32)
    return torch.bmm(left.mT.float(), right.float())


class _Source:
    """Where strips are copied from: as many images as fit, padded and with their channels last.

    Each view is made once: on a GPU the processor's time for it would be waited for.

    Attributes:
        images: (batch, height, width, channels).
        middle: the same of the padded images, of ``together`` of them.
        runs: what each output column needs of each image row: (together, output width, height,
            words of half-precision elements).

    """

    def __init__(
        self,
        images: Tensor,
        convolution: Convolution,
        plan: _Plan,
        precision: Precision,
        limit: int,
    ) -> None:
        channels, stride = images.shape[1], convolution.stride
        rows = (plan.products[0] * plan.together - 1) * stride[0] + convolution.kernel[0]
        together = min(limit // (rows * plan.run), precision.block_rows) // plan.width
        shape = (max(1, min(together, len(images))), rows)
        top, left = convolution.padding[0][0], convolution.padding[1][0] * channels
        self.images = images.permute(0, 2, 3, 1)
        _, height, width, _ = self.images.shape
        reach = (plan.width - 1) * stride[1] * channels + plan.run
        pitch = math.ceil(max(reach, left + width * channels) / RUN) * RUN
        padded = images.new_zeros((*shape, pitch), dtype=precision.products)
        middle = padded[:, top : top + height, left : left + width * channels]
        self.middle = middle.unflatten(2, (width, channels))
        step = stride[1] * channels
        elements = math.gcd(step, max(WORDS))
        words = padded.view(WORDS[elements]).unfold(2, plan.run // elements, step // elements)
        self.runs = words[:, :, : plan.width].transpose(1, 2)

    def chunks(self) -> tuple[Tensor, ...]:
        """Split the images."""
        chunks: tuple[Tensor, ...] = self.images.split(len(self.middle))
        return chunks

    def strips(self, chunk: Tensor, relay: Relay) -> Tensor:
        """Copy the strips of a chunk: (batch × output width, height × run)."""
        count = len(chunk)
        self.middle[:count].copy_(chunk)
        strips: Tensor = relay.copy(self.runs[:count], self.runs.dtype).view(self.middle.dtype)
        return strips.flatten(2).flatten(0, 1)


def _by_edge(products: Tensor, plan: _Plan) -> Tensor:
    """Take products apart by line; sum in float64 what all pairs of kernel rows share."""
    fresh = plan.products[1] // plan.together
    features = plan.products[2] - plan.products[1] + fresh
    each = [
        products[:, start : start + fresh, start : start + features]
        for start in range(0, plan.products[1], fresh)
    ]
    by_line = torch.stack(each, 1).flatten(0, 1)[: plan.lines + plan.edges].double()
    shared = by_line[plan.edges : plan.lines].sum(0, keepdim=True)
    return torch.cat([by_line[: plan.edges], shared, by_line[plan.lines :]])


def _as_weight(gram: Tensor, channels: int, convolution: Convolution) -> Tensor:
    """Order features, (kernel row, run of (kernel column, channel)), as the flattened weight's."""
    height, width = convolution.kernel
    for dim in (0, 2):  # after the first turn, one dimension has become two
        gram = gram.unflatten(dim, (height, -1)).narrow(dim + 1, 0, width * channels)
    order = (width, channels)
    ordered = gram.unflatten(3, order).unflatten(1, order).permute(2, 0, 1, 5, 3, 4)
    whole: Tensor = ordered.flatten(3).flatten(0, 2)
    return whole
