"""The linear operations that TrAct treats: how to read one call of them.

Every layer, whatever its class does before (pad, standardise its weight, adapt to its input), ends
in one of a few functions of torch. Reading the call of that function gives the input and the weight
that were truly used, so no layer class needs an implementation of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Convolution:
    """Geometry of a convolution over ``len(kernel)`` spatial dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # (before, after) of each spatial dimension
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class LinearCall:
    """One call of an operation that is linear in ``weight``.

    Attributes:
        name: ``"conv1d"``, ``"conv2d"``, ``"conv3d"``, ``"linear"`` or ``"matmul"``.
        input: (batch, channels, *space) or (channels, *space) for a convolution, else (..., n).
        weight: (out, channels / groups, *kernel), (out, n), or (n, out) for a matmul.
        convolution: the geometry, None where the operation has none.

    """

    name: str
    input: Tensor
    weight: Tensor
    convolution: Convolution | None = None

    @property
    def groups(self) -> int:
        """Number of groups: each has a Gram matrix of its own."""
        return self.convolution.groups if self.convolution else 1

    @property
    def in_features(self) -> int:
        """Features n of one row of the unfolded input, in one group."""
        weight = self.weight.mT if self.name == "matmul" else self.weight
        return weight.shape[1:].numel()


def read_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LinearCall | None:
    """Read a call of a torch function; None where it is no linear operation of an input.

    Args:
        func: the function as torch hands it to a ``TorchFunctionMode``.
        args: its positional arguments.
        kwargs: its named arguments.

    """
    reader = _READERS.get(func)
    return reader(*args, **kwargs) if reader else None


def with_weight(
    weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with another weight in its place."""
    for name in ("weight", "other", "mat2"):
        if name in kwargs:
            return args, {**kwargs, name: weight}
    return (args[0], weight, *args[2:]) if len(args) > 1 else (weight, *args[1:]), kwargs


def _conv_reader(dimensions: int) -> Callable[..., LinearCall]:
    def read(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> LinearCall:
        kernel = tuple(weight.shape[2:])
        spread = _per_dimension(dilation, dimensions)
        convolution = Convolution(
            kernel=kernel,
            stride=_per_dimension(stride, dimensions),
            padding=_padding(padding, kernel, spread),
            dilation=spread,
            groups=groups,
        )
        return LinearCall(f"conv{dimensions}d", input, weight, convolution)

    return read


def _per_dimension(value: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


def _padding(
    padding: int | str | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":  # torch puts the odd element after
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}")
    return tuple((p, p) for p in _per_dimension(padding, len(kernel)))


def _read_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearCall:
    return LinearCall("linear", input, weight)


def _read_matmul(input: Tensor, other: Tensor, **_: Any) -> LinearCall | None:
    # A batch of matrices, or a matrix from the left, is no layer over rows of features.
    return LinearCall("matmul", input, other) if other.dim() == 2 else None


_aten = torch.ops.aten  # what the modules of torch.export call

_READERS: dict[Callable[..., Any], Callable[..., LinearCall | None]] = {
    _aten.conv1d.default: _conv_reader(1),
    _aten.conv2d.default: _conv_reader(2),
    _aten.conv3d.default: _conv_reader(3),
    _aten.conv2d.padding: _conv_reader(2),
    _aten.linear.default: _read_linear,
    torch.conv1d: _conv_reader(1),
    torch.conv2d: _conv_reader(2),
    torch.conv3d: _conv_reader(3),
    F.linear: _read_linear,
    torch.matmul: _read_matmul,
    torch.mm: _read_matmul,
    torch.Tensor.matmul: _read_matmul,
    torch.Tensor.mm: _read_matmul,
    torch.Tensor.__matmul__: _read_matmul,
}
