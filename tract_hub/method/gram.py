"""XᵀX of a layer's unfolded input: the Gram matrix that the gradient is divided by.

X has one row for each place where the weight is applied (image × output position) and one column
for each feature that the weight multiplies there. It exists in pieces only, so the memory that is
needed does not grow with the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_hub.method.calls import Convolution, LinearCall

BLOCK_ROWS = 512
"""Rows that a CPU sums in float32; blocks are summed in float64, or the error of the gradient grows
with the batch. On photographs in 16 × 16 patches it is 1.3e-6 (AVX2 and AVX-512); blocks of 128
rows, with an error of 9e-7, take a quarter longer or more (Intel Xeon)."""

HALF_BLOCK_ROWS = 4096
"""The same for the matrix units of a GPU, which cut rather than round: an error of 2e-5 on an H200,
measured with the first edition's code."""

HALF_ALIGNMENT = 8
"""Elements of half precision in 16 bytes, which a matrix unit loads at once."""

PANEL = 128
"""Columns of a large matrix that a CPU multiplies together: what lies left of the diagonal is
copied, not computed. 64 to 256 take about as long on an Intel Xeon; no other CPU was tried."""

CHUNK_ELEMENTS = 5 * 2**19
"""Unfolded elements held at a time on a CPU, 10 MiB in float32. For 16 × 16 patches on an Intel
Xeon, two fifths of it take 1.15 times as long, and more brings nothing."""

GPU_CHUNK_ELEMENTS = 24 * 2**20
"""The same on a GPU, where few large products are better: 48 MiB in half precision."""

RUN = 32
"""Neighbouring features whose mean is split off: 4 to 32 have the same error, and fewer take up to
twice as long (AMD EPYC)."""

ROUNDING = 8
"""Rounding errors of XᵀX, in units of eps × trace: twice the largest that photographs, ramps,
constants and noise have shown."""


def gram_matrix(call: LinearCall, dtype: torch.dtype) -> Tensor:
    """Compute the sum of xxᵀ over the rows x of a call's unfolded input.

    Args:
        call: the layer's call, with at least one row.
        dtype: of the products: float64, float32, or a half precision on a GPU, whose products are
            exact in float32.

    Returns:
        (groups, n, n), in the widest dtype that the device has. Not divided by the rows.

    """
    total: Tensor | None = None
    lines = _goes_by_lines(call)
    for part in _parts(call, lines, dtype):
        if lines and call.convolution is not None:
            sums = _products_of_lines(part, call.convolution)
        else:
            sums = gram_of_rows(_unfold(part, call.convolution))
        total = sums if total is None else total + sums
    if total is None:
        raise ValueError("a Gram matrix needs at least one row")
    if lines and call.convolution is not None:
        return _joined_lines(total, call.in_features // math.prod(call.convolution.kernel))
    return total


def unfolded(call: LinearCall, dtype: torch.dtype) -> Tensor:
    """Return X whole, (groups, rows, n), features in the order of the flattened weight."""
    images = call.input.to(dtype)
    if call.convolution is not None:
        images = _padded(_batched(images, call.convolution), call.convolution)
    return _unfold(images, call.convolution)


def count_rows(call: LinearCall) -> int:
    """Rows of X: batch × output positions of a convolution, all leading dimensions otherwise."""
    if call.convolution is None:
        return call.input.shape[:-1].numel()
    spatial = len(call.convolution.kernel)
    batch = call.input.shape[0] if call.input.dim() == spatial + 2 else 1
    return batch * math.prod(output_size(call.convolution, tuple(call.input.shape[-spatial:])))


def output_size(convolution: Convolution, space: tuple[int, ...]) -> tuple[int, ...]:
    """Output positions of a convolution along each spatial dimension."""
    c = convolution
    geometry = zip(space, c.padding, c.dilation, c.kernel, c.stride, strict=True)
    return tuple((size + sum(pad) - d * (k - 1) - 1) // s + 1 for size, pad, d, k, s in geometry)


def product_dtype(input: Tensor, operands: torch.dtype | None) -> torch.dtype:
    """Choose the dtype of the products XᵀX.

    Args:
        input: the layer's input.
        operands: the dtype that autocast multiplies it in, None without autocast.

    Returns:
        float64 for its own kind, where a GPU multiplies it as fast as float32, and where torch was
        told to shorten float32 products (TF32, bfloat16); the layer's own half precision on a GPU;
        else float32.

    """
    if input.dtype == torch.float64:
        return torch.float64
    if input.device.type == "cuda":
        used = operands or input.dtype
        if used.itemsize == 2 and torch.cuda.get_device_capability(input.device) >= (8, 0):
            return used
    if has_fast_float64(input.device) and input.device.type != "cpu":
        return torch.float64
    return widest_dtype(input.device) if _shortens_float32(input.device) else torch.float32


def has_fast_float64(device: torch.device) -> bool:
    """Whether float64 costs at most about twice as much as float32 on a device.

    CPUs do; of the GPUs, those of data centres (A100, H100, B200). Others, slower by 32 to 64
    times, get no work of order n³ in float64. MPS has no float64 at all.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))
    return device.type == "cpu"


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def _shortens_float32(device: torch.device) -> bool:
    """Whether ``torch.set_float32_matmul_precision`` or its like asks for less than float32."""
    backends: Any = torch.backends  # which says nothing of types
    own = (backends.cuda if device.type == "cuda" else backends.mkldnn).matmul.fp32_precision
    asked = backends.fp32_precision if own == "none" else own
    return asked not in ("none", "ieee")


def gram_of_rows(rows: Tensor) -> Tensor:
    """Compute XᵀX of rows that are there: (groups, rows, n) → (groups, n, n).

    In float32, each row is split into its mean m and the rest d: xxᵀ = ddᵀ + m(d1ᵀ + 1dᵀ) + m²11ᵀ.
    Neighbouring pixels are alike, so d is small, and with it what the products round: the error of
    the gradient on photographs in 16 × 16 patches falls from 1.2e-5 to 9e-7 in blocks of 128 rows.
    """
    count, features = rows.shape[1:]
    number = math.ceil(count / _block_rows(rows))
    # Zeros add nothing. Features of ViTs with patches of 14 × 14 become a multiple of 16 bytes: of
    # such that are not, products took five to ten times as long with the first edition's code.
    spare = -features % HALF_ALIGNMENT if rows.dtype.itemsize == 2 else 0
    rows = _pad(rows, [0, spare, 0, -count % number])
    features += spare
    blocks = rows.unflatten(1, (number, -1))
    cross = None
    if rows.dtype == torch.float32:
        means = blocks.mean(-1, keepdim=True)
        blocks = blocks - means
        # (groups, 1, n): what to add to row i and column j for their cross terms and half of m².
        cross = _summed_blocks(means, blocks) + _summed_blocks(means, means) / 2
    panel = PANEL if rows.device.type == "cpu" else features
    if features <= panel:
        gram = _summed_blocks(blocks, blocks)
    else:
        gram = rows.new_empty((len(rows), features, features), dtype=widest_dtype(rows.device))
        for first in range(0, features, panel):
            last = min(first + panel, features)
            upper = _summed_blocks(blocks[..., first:last], blocks[..., first:])
            gram[:, first:last, first:] = upper
            gram[:, last:, first:last] = upper[..., last - first :].mT
    if cross is not None:
        gram.add_(cross).add_(cross.mT)
    return gram[:, : features - spare, : features - spare]


def gram_of_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute XXᵀ: (groups, rows, n) → (groups, rows, rows), and its part in the dtype of x.

    In float32, each run of features is split into its mean and the rest, which sums to zero, so
    XXᵀ is the sum of the two parts' own products. The rest is small where neighbouring pixels are
    alike: on photographs of 32 × 32 pixels the error of the gradient falls from 3e-4 to 1e-6, in
    1.1 of the time of a product in float32 and half of that in float64 (AMD EPYC).
    """
    if x.dtype != torch.float32:
        product = torch.bmm(x, x.mT)
        return product, product
    runs = _pad(x, [0, -x.shape[-1] % RUN]).unflatten(-1, (-1, RUN))
    means = runs.mean(-1, keepdim=True)
    rest = (runs - means).flatten(-2)
    means = means.squeeze(-1).to(widest_dtype(x.device))
    product = torch.bmm(rest, rest.mT)
    return RUN * (means @ means.mT) + product, product


def _summed_blocks(left: Tensor, right: Tensor) -> Tensor:
    """Sum leftᵀ·right over the blocks of (groups, blocks, rows, n)."""
    wide = widest_dtype(left.device)
    if left.shape[1] == 1:  # the usual case of a small batch: nothing to sum
        return _product(left[:, 0], right[:, 0]).to(wide)
    products = _product(left.flatten(0, 1), right.flatten(0, 1))
    total: Tensor = products.unflatten(0, left.shape[:2]).sum(1, dtype=wide)
    return total


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Leftᵀ·right of (batch, rows, n) and (batch, rows, m); of half precision, in float32."""
    if left.dtype.itemsize == 2:  # on a GPU alone, see product_dtype
        return torch.bmm(left.mT, right, out_dtype=torch.float32)
    return torch.bmm(left.mT, right)


def _products_of_lines(images: Tensor, convolution: Convolution) -> Tensor:
    """Multiply each image row with itself and those below it; sum what each kernel row meets.

    Kernel rows a ≤ b meet the image rows s·y + a and s·y + b at output line y. So it is enough to
    multiply each image row with the rows below it, once, and to sum the right ones: 2/7 of the
    multiplications and of the copies for a 7 × 7 kernel of stride 2. In three dimensions a "row" is
    a slice of the volume.

    Args:
        images: (batch, channels, *space), padded, and with as many rows more as the kernel has.
        convolution: its geometry, of one group, without dilation in the first dimension.

    Returns:
        (kernel rows, n, kernel rows × n): for kernel row a, its products with a, a + 1, … and with
        rows below the kernel; n features in a row.

    """
    height, stride = convolution.kernel[0], convolution.stride[0]
    lines = (images.shape[2] - 2 * height) // stride + 1
    count = stride * (lines - 1) + height  # image rows that a window reads
    view = images
    for index, (kernel, step, dilation) in enumerate(_geometry(convolution)[1:], start=3):
        view = view.unfold(index, dilation * (kernel - 1) + 1, step)[..., ::dilation]
    spatial = images.dim() - 2
    # (batch, channels, rows, *output, *kernel) → (rows, channels × kernel, batch × output)
    order = (2, 1, *range(2 + spatial, 1 + 2 * spatial), 0, *range(3, 2 + spatial))
    rows = view.permute(order).flatten(1 + spatial).flatten(1, spatial)
    n = rows.shape[1]
    windows = rows.flatten(0, 1).unfold(0, height * n, n)  # row i, and those below it
    products = _product(rows[:count].mT, windows[:count])
    wide = widest_dtype(images.device)
    return torch.stack([products[a::stride][:lines].sum(0, dtype=wide) for a in range(height)])


def _joined_lines(sums: Tensor, channels: int) -> Tensor:
    """Put what ``_products_of_lines`` returns in place: (1, channels × kernel, the same)."""
    height, n, _ = sums.shape
    upper = [F.pad(sums[a, :, : (height - a) * n], (a * n, 0)) for a in range(height)]
    # From (row, channel, rest of the kernel) to (channel, row, rest), as the weight has them.
    sizes = (height, channels, n // channels)
    whole: Tensor = _mirrored(torch.cat(upper)).unflatten(1, sizes).unflatten(0, sizes)
    return whole.permute(1, 0, 2, 4, 3, 5).flatten(3).flatten(0, 2).unsqueeze(0)


def _mirrored(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).mT


def _goes_by_lines(call: LinearCall) -> bool:
    """Whether windows overlap from line to line, or are too small to gain by being unfolded."""
    convolution = call.convolution
    if convolution is None or convolution.groups > 1 or convolution.dilation[0] > 1:
        return False
    return convolution.kernel[0] > convolution.stride[0] or call.in_features < PANEL


def _parts(call: LinearCall, by_lines: bool, dtype: torch.dtype) -> Iterator[Tensor]:
    """Split the padded input so that little of it is unfolded at a time: images, else lines."""
    x, convolution = call.input, call.convolution
    limit = CHUNK_ELEMENTS if x.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    if convolution is None:
        for part in x.reshape(-1, x.shape[-1]).split(max(1, limit // x.shape[-1])):
            yield part.to(dtype)
        return
    images = _batched(x, convolution)
    height, stride = convolution.kernel[0], convolution.stride[0]
    lines, *others = output_size(convolution, tuple(images.shape[2:]))
    line = call.in_features * convolution.groups * math.prod(others)
    below = height if by_lines else 0  # see ``_products_of_lines``; their values do not count
    if by_lines:
        line = line * min(stride, height) // height  # image rows are unfolded once, not each window
    together = max(1, limit // (line * lines))
    if dtype.itemsize == 2:  # positions along an image row are summed by the matrix units
        together = max(1, min(together, HALF_BLOCK_ROWS // math.prod(others)))
        if together > HALF_ALIGNMENT:  # for lines of 149 positions, as Inception's
            together -= together % HALF_ALIGNMENT
    step = min(lines, max(1, limit // line))
    for some in images.split(together):
        padded = _padded(some.to(dtype), convolution, below)
        for first in range(0, lines, step):
            last = min(first + step, lines) - 1
            reach = convolution.dilation[0] * (height - 1) + 1 + below
            yield padded[:, :, stride * first : stride * last + reach]


def _unfold(images: Tensor, convolution: Convolution | None) -> Tensor:
    """(batch, channels, *space), padded → (groups, rows, n); one copy at most."""
    if convolution is None:
        return images.reshape(1, -1, images.shape[-1])
    view = images
    for index, (kernel, stride, dilation) in enumerate(_geometry(convolution), start=2):
        view = view.unfold(index, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    spatial = len(convolution.kernel)
    grouped: Tensor = (
        view.unflatten(1, (convolution.groups, -1)).movedim(2, 2 + spatial).movedim(1, 0)
    )
    return grouped.flatten(2 + spatial).flatten(1, 1 + spatial)


def _geometry(convolution: Convolution) -> list[tuple[int, int, int]]:
    return list(zip(convolution.kernel, convolution.stride, convolution.dilation, strict=True))


def _padded(images: Tensor, convolution: Convolution, below: int = 0) -> Tensor:
    """Pad as the convolution does, and by so many rows more."""
    *sizes, last = (size for pair in reversed(convolution.padding) for size in pair)
    return _pad(images, [*sizes, last + below])


def _pad(tensor: Tensor, sizes: list[int]) -> Tensor:
    """Pad as ``F.pad`` does, which copies where there is nothing to pad too."""
    return F.pad(tensor, sizes) if any(sizes) else tensor


def _batched(input: Tensor, convolution: Convolution) -> Tensor:
    return input if input.dim() == len(convolution.kernel) + 2 else input.unsqueeze(0)


def _block_rows(rows: Tensor) -> int:
    """Rows that may be summed in the products' own precision."""
    if rows.dtype.itemsize == 2:
        return HALF_BLOCK_ROWS
    # Elsewhere than on a CPU many small products take longer, and a large one is summed in parts.
    return BLOCK_ROWS if rows.dtype == torch.float32 and rows.device.type == "cpu" else len(rows[0])
