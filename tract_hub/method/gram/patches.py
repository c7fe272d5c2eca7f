"""The rows of a layer's input: one row of features for each place where its weight is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from tract_hub.method.operations import Convolution, LinearCall

CHUNK_ELEMENTS = 4 * 2**20
"""Unfolded elements held at a time: 16 MiB in float32."""

Copy = Callable[[Tensor], Tensor]
"""Makes a contiguous copy of a view."""


def count_rows(call: LinearCall) -> int:
    """Rows of X: batch × output positions of a convolution, all leading dimensions otherwise."""
    if call.convolution is None:
        return call.input.shape[:-1].numel()
    batched = _batched(call.input, call.convolution)
    rows = batched.shape[0]
    for size in output_size(call.convolution, tuple(batched.shape[2:])):
        rows *= size
    return rows


def output_size(convolution: Convolution, space: tuple[int, ...]) -> tuple[int, ...]:
    """Output positions of a convolution along each spatial dimension."""
    return tuple(
        (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
        for size, padding, dilation, kernel, stride in zip(
            space,
            convolution.padding,
            convolution.dilation,
            convolution.kernel,
            convolution.stride,
            strict=True,
        )
    )


def row_chunks(
    call: LinearCall, limit: int = CHUNK_ELEMENTS, copy: Copy | None = None
) -> Iterator[Tensor]:
    """Yield X in pieces of shape (groups, rows, n), as ``copy`` makes them of views.

    Without it they are in the input's dtype, and no copies where the input is laid out so.

    A piece holds about ``limit`` elements (at least one line of output positions), so that the
    memory needed does not grow with the batch. The features are in the order of the flattened
    weight, and the padding is the operation's own.
    """
    if call.convolution is None:
        flat = call.input.reshape(1, -1, call.input.shape[-1])
        for piece in flat.split(max(1, limit // max(1, flat.shape[-1])), dim=1):
            yield piece if copy is None else copy(piece)
        return
    batched = _batched(call.input, call.convolution)
    lines, *others = output_size(call.convolution, tuple(batched.shape[2:]))
    line = call.in_features * call.convolution.groups
    for size in others:
        line *= size
    line_step = min(lines, max(1, limit // max(1, line)))
    image_step = max(1, limit // max(1, line * lines))
    for images in batched.split(image_step):
        windows = _windows(images, call.convolution)
        for piece in windows.split(line_step, dim=2):
            yield _as_rows(piece, call.convolution.groups, copy)


def pad_images(images: Tensor, convolution: Convolution) -> Tensor:
    """Pad with zeros as the convolution does by itself."""
    before_after = [amount for pair in reversed(convolution.padding) for amount in pair]
    return F.pad(images, before_after) if any(before_after) else images


def _batched(input: Tensor, convolution: Convolution) -> Tensor:
    return input if input.dim() == len(convolution.kernel) + 2 else input.unsqueeze(0)


def _windows(images: Tensor, convolution: Convolution) -> Tensor:
    """View images as (batch, channels, *output, *kernel); nothing but the padding is copied."""
    view = pad_images(images, convolution)
    for index, (kernel, stride, dilation) in enumerate(
        zip(convolution.kernel, convolution.stride, convolution.dilation, strict=True)
    ):
        view = view.unfold(2 + index, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return view


def _as_rows(windows: Tensor, groups: int, copy: Copy | None) -> Tensor:
    """(batch, channels, *output, *kernel) → (groups, batch × output, n); one copy at most."""
    dimensions = (windows.dim() - 2) // 2
    grouped = windows.unflatten(1, (groups, -1))
    output = range(3, 3 + dimensions)
    kernel = range(3 + dimensions, 3 + 2 * dimensions)
    rows = grouped.permute(1, 0, *output, 2, *kernel)
    if copy is not None:
        rows = copy(rows)
    flat: Tensor = rows.flatten(dimensions + 2).flatten(1, dimensions + 1)
    return flat
