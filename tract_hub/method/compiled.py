"""The Gram matrix and its inverse as operators that a compiled graph calls on a GPU as they are.

A compiler would hold every piece of the unfolded input, leave the matrix to the backward, and wait
there for its factorisation. Operators that it does not look into keep what eager code does: pieces,
half-precision products, and a stream beside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from tract_hub.errors import TractError
from tract_hub.method.engine import Gate, in_transform
from tract_hub.method.gram.matrix import gram_of
from tract_hub.method.gram.precision import widest_dtype
from tract_hub.method.operations import Convolution, LinearCall
from tract_hub.method.solve.ahead import invert_ahead
from tract_hub.method.solve.divide import multiply
from tract_hub.method.streams import side_stream, streams_beside

DEVICES = ("cuda",)
"""Kinds of devices whose compiled graphs call the operators."""


def calls_operators(call: LinearCall) -> bool:
    """Whether a graph is being compiled for a GPU, where an inverse is exact enough."""
    here = torch.compiler.is_compiling() and call.input.device.type in DEVICES
    return here and call.weight.dtype != torch.float64


def check_compiler() -> None:
    """Refuse what torch would compile to the ordinary gradient, without a word.

    Raises:
        TractError: a transform of torch.func is being compiled. In such a graph a weight does not
            say that it takes a gradient, and torch below 2.15 leaves out what a custom function
            does in its backward.

    """
    if torch.compiler.is_compiling() and in_transform():
        raise TractError(
            "torch compiles torch.func transforms without TrAct's gradient: leave the transform "
            "out of torch.compile, or compile without fullgraph, which does so by itself"
        )


def correct_compiled(weight: Tensor, call: LinearCall, lam: float, site: str) -> Tensor:
    """Return a weight whose gradient is that of TrAct, in a graph that is compiled for a GPU.

    Args:
        weight: (out, ...) of ``groups × n`` features in all.
        call: the call that it is used in, the only one of its forward.
        lam: the damping λ.
        site: what the layer is remembered by, see ``gram_of``.

    """
    convolution = call.convolution
    geometry = [] if convolution is None else _flattened(convolution)
    with torch.no_grad():
        inverse = torch.ops.tract_hub.inverse(
            call.input, call.name, list(call.weight.shape), geometry, call.operands, lam, site
        )
    gated: Tensor = _CorrectCompiled.apply(weight, inverse)
    return gated


class _CorrectCompiled(Gate):
    @staticmethod
    def forward(weight: Tensor, inverse: Tensor) -> Tensor:
        return torch.ops.tract_hub.gate(weight, inverse)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        return torch.ops.tract_hub.multiply(gradients[0], inverse), None


# They use another stream, and keep what they have seen: a recorded graph must go around them.
_UNRECORDED = (torch.Tag.cudagraph_unsafe,)


@custom_op(
    "tract_hub::inverse",
    mutates_args=(),
    tags=_UNRECORDED,
    schema="(Tensor input, str name, SymInt[] weight, int[] geometry, ScalarType? operands, "
    "float lam, str site) -> Tensor",
)
def _inverse(
    input: Tensor,
    name: str,
    weight: list[int],
    geometry: list[int],
    operands: torch.dtype | None,
    lam: float,
    site: str,
) -> Tensor:
    shape = torch.empty(weight, device="meta")
    convolution = _unflattened(geometry, tuple(weight[2:])) if geometry else None
    gram = gram_of(LinearCall(name, input, shape, convolution, operands), lam, site)
    return invert_ahead(gram, lam).inverse


@_inverse.register_fake
def _(input: Tensor, name: str, weight: list[int], geometry: list[int], *_: Any) -> Tensor:
    groups = geometry[-1] if geometry else 1
    features = weight[0] if name == "matmul" else torch.Size(weight[1:]).numel()
    return input.new_empty((groups, features, features), dtype=widest_dtype(input.device))


@custom_op("tract_hub::gate", mutates_args=(), schema="(Tensor weight, Tensor inverse) -> Tensor")
def _gate(weight: Tensor, inverse: Tensor) -> Tensor:
    # What the forward needs is computed in the forward: a copy that names the inverse sees to it.
    return weight.clone()


@_gate.register_fake
def _(weight: Tensor, inverse: Tensor) -> Tensor:
    return torch.empty_like(weight)


@custom_op(
    "tract_hub::multiply",
    mutates_args=(),
    tags=_UNRECORDED,
    schema="(Tensor gradient, Tensor inverse) -> Tensor",
)
def _multiply(gradient: Tensor, inverse: Tensor) -> Tensor:
    if streams_beside(inverse.device):
        current = torch.cuda.current_stream(inverse.device)
        current.wait_stream(side_stream(inverse.device))
        inverse.record_stream(current)
    return multiply(gradient, inverse)


@_multiply.register_fake
def _(gradient: Tensor, inverse: Tensor) -> Tensor:
    return torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)


def _flattened(convolution: Convolution) -> list[int]:
    padding = [amount for pair in convolution.padding for amount in pair]
    return [*convolution.stride, *padding, *convolution.dilation, convolution.groups]


def _unflattened(geometry: list[int], kernel: tuple[int, ...]) -> Convolution:
    n = len(kernel)
    stride, padding, dilation = geometry[:n], geometry[n : 3 * n], geometry[3 * n : 4 * n]
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return Convolution(kernel, tuple(stride), pairs, tuple(dilation), geometry[-1])
