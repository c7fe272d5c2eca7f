"""Where autograd applies the method: identities that change the gradient of one weight alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tract_hub.config import Settings
from tract_hub.method.accumulate import Accumulator
from tract_hub.method.calls import Convolution, LinearCall
from tract_hub.method.correct import Observer, corrected, in_transform
from tract_hub.method.gram import count_rows


@dataclass(frozen=True)
class Use:
    """What the backward has to know of a call, beside its input.

    Attributes:
        convolution: the geometry, None for a matrix product.
        settings: λ, how it damps, whose rows count.
        operands: the dtype that autocast multiplies the input in, None without autocast.
        observe: is shown the mean square of the input, where looking is free.

    """

    convolution: Convolution | None
    settings: Settings
    operands: torch.dtype | None
    observe: Observer | None

    def call(self, input: Tensor, weight: Tensor) -> LinearCall:
        """Put the call together again; of the weight, only the shape counts."""
        return LinearCall("", input, weight, self.convolution)


class WeightGate(torch.autograd.Function):
    """The weight itself; on the way back, ∇W ↦ ∇W · (XᵀX / rows + λI)⁻¹."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, input: Tensor, use: Use) -> Tensor:
        """Return a view of the weight, (out, ...)."""
        return weight.detach()  # not view_as: it loses the strides of a one-channel weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the layer's input, which its operation keeps anyway."""
        ctx.save_for_backward(inputs[1])
        ctx.use = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Correct the gradient of the weight."""
        (input,), use = ctx.saved_tensors, ctx.use
        gradient = gradients[0]
        call = use.call(input, gradient)
        return _correct(gradient, call, use, gradient.dtype, dual=False), None, None


class EagerWeightGate(WeightGate):
    """The same with a forward-mode derivative, that of the identity.

    No gate of a compiled graph can have it: torch.compile refuses functions that do.
    """

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Return the weight's tangent."""
        return tangents[0].view_as(tangents[0])


class OutputGate(torch.autograd.Function):
    """The output of a layer whose weight is detached; on the way back, δ ↦ δ and its own ∇W.

    For an input of fewer rows than features that takes no gradient, see ``dual_gradient``.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, weight: Tensor, input: Tensor, use: Use) -> Tensor:
        """Return the output, in a way that the next layer may write into it."""
        ctx.save_for_backward(input)
        ctx.use, ctx.shape, ctx.dtype = use, weight.shape, weight.dtype
        return output.detach()  # not mark_dirty: a checkpoint may keep the output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Pass δ on, and give the weight its corrected gradient."""
        (input,), use = ctx.saved_tensors, ctx.use
        shape = torch.empty(ctx.shape, device="meta")
        gradient = _correct(gradients[0], use.call(input, shape), use, ctx.dtype, dual=True)
        return gradients[0], gradient, None, None


class AccumulatorGate(torch.autograd.Function):
    """The weight itself; on the way back, the rows of the step are counted, see ``accumulate``."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, input: Tensor, use: Use, accumulator: Accumulator
    ) -> Tensor:
        """Return a view of the weight."""
        ctx.save_for_backward(input)
        ctx.use, ctx.accumulator = use, accumulator
        return weight.detach()  # not view_as: it loses the strides of a one-channel weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the ordinary gradient on."""
        (input,) = ctx.saved_tensors
        call = ctx.use.call(input, gradients[0])
        ctx.accumulator.add(call, ctx.use.operands)
        return gradients[0], None, None, None


GATES = tuple(
    f"{gate.__name__}Backward"
    for gate in (WeightGate, EagerWeightGate, OutputGate, AccumulatorGate)
)
"""Names of these gates in autograd's graph: what lies behind one is corrected already."""


def use_of(call: LinearCall, settings: Settings, observe: Observer | None) -> Use:
    """Note what a backward has to know of a call."""
    kind = call.input.device.type
    # The meta device has no autocast to ask for.
    casts = kind != "meta" and torch.is_autocast_enabled(kind)
    casts = casts and call.input.dtype != torch.float64
    operands = torch.get_autocast_dtype(kind) if casts else None
    free = kind == "cpu" and not torch.compiler.is_compiling() and not in_transform()
    return Use(call.convolution, settings, operands, observe if free else None)


def gate_weight(weight: Tensor, call: LinearCall, use: Use) -> Tensor:
    """Return a weight, (out, ...), whose gradient is that of TrAct."""
    gate = WeightGate if torch.compiler.is_compiling() else EagerWeightGate
    gated: Tensor = gate.apply(weight, call.input.detach(), use)
    return gated


def suits_output_gate(call: LinearCall) -> bool:
    """Whether the correction is cheaper and as exact from the output's gradient.

    Not where the input takes a gradient, as in a gradient penalty, whose second derivative reaches
    the weight by way of it; nor in a transform or in forward mode: they would miss the weight.
    """
    if call.input.requires_grad or not 0 < count_rows(call) < call.in_features:
        return False
    if torch.compiler.is_compiling():
        return True
    return not in_transform() and forward_ad.unpack_dual(call.weight).tangent is None


def _correct(
    gradient: Tensor, call: LinearCall, use: Use, dtype: torch.dtype, dual: bool
) -> Tensor:
    return corrected(gradient, call, use.settings, use.operands, dtype, dual, use.observe)
