"""In what precision a Gram matrix is summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tract_hub.method.operations import LinearCall

BLOCK_ROWS = 256
"""Rows that float32 may sum: products of 8-bit pixels then stay below 2²⁴, and so exact."""

FAST_FLOAT64 = ((8, 0), (9, 0), (10, 0))
"""Compute capabilities of the GPUs (A100, H100, B200) that multiply float64 as fast as float32."""


@dataclass(frozen=True)
class Precision:
    """How to sum a Gram matrix.

    Long sums in float32 lose what the damping is to keep: with photographs and λ = 0.1, a float32
    sum over 2·10⁵ rows costs 7e-5 of the gradient, and blocks of 256 rows summed in float64, 1e-6.

    Attributes:
        products: dtype of the products, and of their sum within a block.
        sums: dtype of the sum over blocks.
        block_rows: about how many rows make a block.
        can_widen: whether the result can be looked at, and taken again in float64.

    """

    products: torch.dtype
    sums: torch.dtype
    block_rows: int
    can_widen: bool = False

    @property
    def eps(self) -> float:
        """The rounding unit of the products."""
        return torch.finfo(self.products).eps


def precision_for(call: LinearCall, rows: int) -> Precision:
    """Choose the precision for the Gram matrix of one call.

    Float64 for its own kind; where it is both cheap and needed, with fewer rows than features, as
    such a matrix is singular; where it is as fast as float32; and where float32 would mean TF32.
    """
    device = call.input.device
    if device.type == "mps":  # has no float64
        return Precision(torch.float32, torch.float32, rows)
    if call.input.dtype == torch.float64 or rows < call.in_features:
        return widest(rows)
    if device.type == "cuda" and (_is_fast(device) or torch.backends.cuda.matmul.allow_tf32):
        return widest(rows)
    # Elsewhere than on a CPU many small products take longer than a large one, and a large one is
    # summed in parts anyway; a compiled graph would hold each block.
    block_rows = BLOCK_ROWS if eager_on_cpu(call.input) else rows
    return Precision(torch.float32, torch.float64, block_rows, plain_on_cpu(call.input))


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether operations on a tensor run one by one, on a CPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def plain_on_cpu(tensor: Tensor) -> bool:
    """Whether they do, and no transform of torch.func sees to them."""
    return eager_on_cpu(tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def widest(rows: int) -> Precision:
    """Float64 throughout."""
    return Precision(torch.float64, torch.float64, rows)


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def _is_fast(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in FAST_FLOAT64
