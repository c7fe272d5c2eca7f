"""In what precision a Gram matrix is summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tract_hub.method.engine import in_transform
from tract_hub.method.operations import LinearCall

BLOCK_ROWS = 256
"""Rows that float32 may sum: products of 8-bit pixels then stay below 2²⁴, and so exact."""

HALF_BLOCK_ROWS = 4096
"""Rows of half precision that the matrix units of a GPU may sum, for 2e-5 of the gradient."""

FAST_FLOAT64 = ((8, 0), (9, 0), (10, 0))
"""Compute capabilities of the GPUs (A100, H100, B200) that multiply float64 as fast as float32."""

ROUGH = 64
"""Times its rounding errors that the damping is, at least, where float32 is good enough."""

HALF_ROUGH = 16
"""The same where the layer itself multiplies in half precision."""


@dataclass(frozen=True)
class Precision:
    """How to sum a Gram matrix.

    Long sums in float32 lose what the damping is to keep: with photographs and λ = 0.1, a float32
    sum over 2·10⁵ rows costs 7e-5 of the gradient, and blocks of 256 rows summed in float64, 1e-6.

    Attributes:
        products: dtype of the factors of the products; half precision is summed in float32 within
            a block, any other in itself.
        sums: dtype of the sum over blocks.
        block_rows: about how many rows make a block.
        looks: when the result is looked at, to take it again in float64 if it is too rough for the
            damping: at each time, or now and then, where looking waits for the device.
        rough: times the rounding errors that the damping is, at least, where it is not too rough.

    """

    products: torch.dtype
    sums: torch.dtype
    block_rows: int
    looks: Literal["always", "sometimes", "never"] = "never"
    rough: int = ROUGH

    @property
    def eps(self) -> float:
        """The rounding unit of the products and of their sums within a block."""
        return torch.finfo(torch.float32 if self.half else self.products).eps

    @property
    def half(self) -> bool:
        """Whether the factors are of half precision: their products are exact in float32."""
        return self.products in (torch.bfloat16, torch.float16)


def precision_for(call: LinearCall, rows: int) -> Precision:
    """Choose the precision for the Gram matrix of one call.

    Float64 for its own kind; where it is both cheap and needed, with fewer rows than features, as
    such a matrix is singular; in a compiled graph, which would hold every block; where it is as
    fast as float32; and where torch may multiply float32 in TF32 or bfloat16. Half precision on a
    GPU where the layer itself multiplies in it.
    """
    device = call.input.device
    if device.type == "mps":  # has no float64
        return Precision(torch.float32, torch.float32, rows)
    few = rows < call.in_features
    if call.input.dtype == torch.float64 or few or torch.compiler.is_compiling():
        return widest(rows)
    if device.type == "cuda" and not in_transform() and _multiplies_halves(call):
        operands = call.operands or call.input.dtype
        return Precision(operands, torch.float64, HALF_BLOCK_ROWS, "sometimes", HALF_ROUGH)
    if (device.type == "cuda" and _is_fast(device)) or _shortens_float32(device):
        return widest(rows)
    # Elsewhere than on a CPU many small products take longer than a large one, and a large one is
    # summed in parts anyway.
    blocks = BLOCK_ROWS if device.type == "cpu" else rows
    looks: Literal["always", "never"] = "always" if plain_on_cpu(call.input) else "never"
    return Precision(torch.float32, torch.float64, blocks, looks)


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether operations on a tensor run one by one, on a CPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def plain_on_cpu(tensor: Tensor) -> bool:
    """Whether they do, and no transform of torch.func sees to them."""
    return eager_on_cpu(tensor) and not is_transformed(tensor)


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of torch.func sees to a tensor, outside of compiled graphs."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped


def widest(rows: int) -> Precision:
    """Float64 throughout."""
    return Precision(torch.float64, torch.float64, rows)


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def _shortens_float32(device: torch.device) -> bool:
    """Whether ``torch.set_float32_matmul_precision`` or its like asks for less than float32."""
    backends: Any = torch.backends  # which says nothing of types
    own = (backends.cuda if device.type == "cuda" else backends.mkldnn).matmul.fp32_precision
    asked = backends.fp32_precision if own == "none" else own
    return asked not in ("none", "ieee")


def _is_fast(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in FAST_FLOAT64


def _multiplies_halves(call: LinearCall) -> bool:
    """Whether a layer on a GPU multiplies in half precision, as torch lets matrix units do too."""
    capable = torch.cuda.get_device_capability(call.input.device) >= (8, 0)
    operands = call.operands or call.input.dtype
    return operands.itemsize == 2 and capable and torch.version.hip is None
