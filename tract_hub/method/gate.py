"""The weight gate: an identity forward, the TrAct correction backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tract_hub.errors import TractWarning
from tract_hub.method import engine
from tract_hub.method.engine import Gate, dual_identity
from tract_hub.method.gram.matrix import Gram
from tract_hub.method.gram.precision import is_transformed
from tract_hub.method.measure import measure
from tract_hub.method.operations import LinearCall
from tract_hub.method.solve.ahead import Ahead, invert_ahead
from tract_hub.method.solve.divide import divide_by_gram

Correction = Callable[[Tensor], Tensor]
"""Puts an identity on a weight (out, ...) whose backward corrects the gradient."""


def gate_weight(call: LinearCall, correction: Correction) -> Tensor:
    """Return the weight of a call such that its gradient is that of TrAct."""
    # A matmul's weight is (n, out); its transpose is laid out as a Linear's.
    weight = call.weight.mT if call.name == "matmul" else call.weight
    gated = correction(weight)
    return gated.mT if call.name == "matmul" else gated


def correct_forward(
    weight: Tensor, gram: Gram, lam: float, uses: Sequence[Gram], probe: Tensor | None = None
) -> Tensor:
    """Return a weight whose gradient is that of TrAct over the rows of one forward.

    Args:
        weight: (out, ...) of ``groups × n`` features in all.
        gram: the Gram matrix of the input that it is applied to.
        lam: the damping λ.
        uses: the Gram matrices of all uses of this weight in one forward, this one included,
            read when the backward comes and all of them are known.
        probe: a leaf whose gradient becomes what ``measure`` says about this one.

    """
    if _suits_ahead(weight, gram):
        ahead = invert_ahead(gram, lam)
        gated: Tensor = _CorrectAhead.apply(weight, ahead, gram, lam, uses, probe)
    else:
        correct = _Correct if torch.compiler.is_compiling() else _CorrectEager
        gated = correct.apply(weight, gram.total, gram.rows, gram.eps, lam, uses, probe)
    return gated


def _suits_ahead(weight: Tensor, gram: Gram) -> bool:
    """Whether the inverse can be made on a GPU now, and is exact enough for the gradient."""
    on_gpu = gram.sums.device.type == "cuda" and weight.dtype != torch.float64
    if not on_gpu or torch.compiler.is_compiling():
        return False
    return not (is_transformed(weight) or is_transformed(gram.sums))


def notice(weight: Tensor, report: Callable[[], None]) -> Tensor:
    """Return the weight, such that a gradient that comes back to it is reported, unchanged."""
    function = _Report if torch.compiler.is_compiling() else _ReportEager
    reporting: Tensor = function.apply(weight, report)
    return reporting


def warn_of_eval(name: str) -> None:
    """Warn that the gradient of this weight is the ordinary one."""
    warnings.warn(
        f"TrAct left the gradient of {name!r} as it was: the forward ran in eval mode. "
        "Call model.train() before a training step.",
        TractWarning,
        stacklevel=5,
    )


class _Correct(Gate):
    """∇W ↦ ∇W · (XᵀX / rows + λI)⁻¹ on the way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        total: Tensor,
        rows: int,
        eps: float,
        lam: float,
        uses: Sequence[Gram],
        probe: Tensor | None,
    ) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, total, ctx.rows, ctx.eps, ctx.lam, ctx.uses, probe = inputs
        ctx.probed = probe is not None
        ctx.save_for_backward(total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (total,) = ctx.saved_tensors
        gram = _over(ctx.uses, Gram(total, ctx.rows, ctx.eps))
        corrected = divide_by_gram(gradients[0], gram, ctx.lam)
        probed = measure(gradients[0], corrected, gram, ctx.lam) if ctx.probed else None
        return corrected, None, None, None, None, None, probed


class _CorrectEager(_Correct):
    jvp = staticmethod(dual_identity)


class _CorrectAhead(Gate):
    """The same with an inverse that is on its way, and so cannot be saved as tensors are."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        ahead: Ahead,
        gram: Gram,
        lam: float,
        uses: Sequence[Gram],
        probe: Tensor | None,
    ) -> Tensor:
        ctx.ahead, ctx.gram, ctx.lam, ctx.uses = ahead, gram, lam, uses
        ctx.probed = probe is not None
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gram = _over(ctx.uses, ctx.gram)
        if gram is ctx.gram:
            corrected = ctx.ahead.times(gradients[0])
        else:
            corrected = divide_by_gram(gradients[0], gram, ctx.lam)
        probed = measure(gradients[0], corrected, gram, ctx.lam) if ctx.probed else None
        if not engine.keeps_graph():  # a loss that is kept must not keep the matrices
            ctx.ahead = ctx.gram = ctx.uses = None
        return corrected, None, None, None, None, probed


def _over(uses: Sequence[Gram], own: Gram) -> Gram:
    """The Gram matrix over all uses of a forward, of which ``own`` is one."""
    return sum(uses[1:], start=uses[0]) if len(uses) > 1 else own


class _Report(Gate):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, report: Callable[[], None]) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.report = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.report()
        return gradients[0], None


class _ReportEager(_Report):
    jvp = staticmethod(dual_identity)
