"""The method: ∇W ↦ ∇W · (XᵀX / rows + λI)⁻¹, and the two places where autograd applies it.

``correct_gradient`` takes the ordinary gradient of the weight: it holds for any gradient, also one
of a second derivative. ``dual_gradient`` takes the gradient of the layer's output instead, where
X has fewer rows than features: ∇W = δᵀX, so ∇W · (XᵀX/r + λI)⁻¹ = ((XXᵀ/r + λI)⁻¹ δ)ᵀ X, which
needs a matrix of rows × rows only and saves the product that gives the ordinary gradient.

Source: Petersen, Borgelt, Ermon, NeurIPS 2024, the closed form of section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from tract_hub.config import Settings
from tract_hub.method.calls import Convolution, LinearCall
from tract_hub.method.gram import (
    ROUNDING,
    count_rows,
    gram_matrix,
    gram_of_columns,
    has_fast_float64,
    product_dtype,
    unfolded,
    widest_dtype,
)

SAFETY = 64
"""Times its rounding errors that the damping is, at least, where products in float32 do."""

SMALL_PRODUCT = 2**23
"""Multiplications of XXᵀ up to which a CPU takes float64: it takes as long for the 64 × 64 × 784 of
an MLP, looking at the rounding errors included, and 1.6 times as long for 64 × 64 × 3,072 (AMD
EPYC)."""

Observer = Callable[[Tensor], None]
"""Is shown the mean square of the input, (groups,), where looking at it is free."""


@dataclass(frozen=True)
class Moment:
    """The second moment XᵀX / rows of a layer's input, or XXᵀ / rows.

    Attributes:
        sums: XᵀX, (groups, n, n), or XXᵀ, (groups, rows, rows).
        rows: how many rows were summed; a tensor where processes have summed them.
        features: n.
        eps: the rounding unit of the products.
        rounded: the part of the sums that has this rounding unit; None: all of them.

    """

    sums: Tensor
    rows: int | Tensor
    features: int
    eps: float
    rounded: Tensor | None = None

    @cached_property
    def trace(self) -> Tensor:
        """(groups, 1, 1): n times the mean square of the input."""
        return _trace(self.sums) / self.rows

    @cached_property
    def rounding(self) -> Tensor:
        """Bound of the matrix's rounding errors, as an eigenvalue, (groups, 1, 1)."""
        trace = self.trace if self.rounded is None else _trace(self.rounded) / self.rows
        return ROUNDING * self.eps * trace

    def allows(self, settings: Settings) -> bool:
        """Whether λ is far above the rounding errors; a look at the numbers."""
        damping = settings.lam if settings.damping == "absolute" else self._relative(settings)
        # Not `>`: where the sums overflowed, too.
        return bool((SAFETY * self.rounding <= damping).all())

    def damped(self, settings: Settings) -> tuple[Tensor, Tensor]:
        """Return the second moment + λI, and its λ, (groups, 1, 1), raised to the rounding errors.

        λ is absolute, or relative to the mean square trace / n.
        """
        if settings.damping == "absolute":
            damping = self.rounding.clamp_min(settings.lam)
        else:
            damping = torch.maximum(self._relative(settings), self.rounding)
        matrix = self.sums / self.rows
        matrix.diagonal(dim1=-2, dim2=-1).add_(damping[..., 0])
        return matrix, damping

    def _relative(self, settings: Settings) -> Tensor:
        damping = settings.lam / self.features * self.trace
        return damping + (damping == 0)  # zeros have a gradient of zeros, not 0 / 0


def moment_of(
    call: LinearCall,
    settings: Settings,
    operands: torch.dtype | None = None,
    x: Tensor | None = None,
) -> Moment:
    """Compute XᵀX / rows of a call with at least one row, or XXᵀ / rows of its unfolded input x.

    Where λ lies too near the rounding errors of float32, a CPU takes float64. Elsewhere looking
    would wait for the device: λ is raised instead, see ``Moment.damped``.
    """
    on_cpu = call.input.device.type == "cpu"
    dtype = product_dtype(call.input if x is None else x, operands)
    small = x is not None and count_rows(call) * x.numel() < SMALL_PRODUCT and on_cpu
    if dtype == torch.float32 and (small or in_transform()):  # vmap has no number to look at
        dtype = torch.float64
    moment = _moment_in(dtype, call, x)
    if dtype == torch.float32 and on_cpu and not moment.allows(settings):
        moment = _moment_in(torch.float64, call, x)
    return moment


def correct_gradient(
    gradient: Tensor,
    call: LinearCall,
    settings: Settings,
    operands: torch.dtype | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Return ∇W · (XᵀX / rows + λI)⁻¹.

    Args:
        gradient: ∇W, (out, ...) of ``groups × n`` features in all; any floating dtype.
        call: the call that used the weight.
        settings: λ and how it damps.
        operands: the dtype that autocast multiplied the input in, None without autocast.
        observe: is shown the mean square of the input.

    Returns:
        The gradient's shape and dtype. NaN throughout a group whose Gram matrix is not finite,
        zeros for an empty batch.

    """
    rows = count_rows(call)
    if rows == 0:
        return torch.zeros_like(gradient)
    with torch.autocast(gradient.device.type, enabled=False):
        if rows < call.in_features:
            return _woodbury(gradient, call, settings)
        moment = moment_of(call, settings, operands)
        if observe is not None:
            observe(moment.trace.flatten() / call.in_features)
        return divide(gradient, moment, settings)


def divide(gradient: Tensor, moment: Moment, settings: Settings) -> Tensor:
    """Return ∇W · (moment + λI)⁻¹ by Cholesky, in the gradient's shape and dtype."""
    groups, features, _ = moment.sums.shape
    exact = has_fast_float64(gradient.device) or gradient.dtype == torch.float64
    dtype = torch.float64 if exact else torch.float32
    damped, damping = moment.damped(settings)
    factor, info = torch.linalg.cholesky_ex(damped.to(dtype))
    ordinary = gradient.reshape(groups, -1, features).to(damped.dtype)
    solved = _solved(ordinary.to(dtype), factor)
    if dtype != damped.dtype:
        # One step of refinement, n² · out products in float64: on photographs in 16 × 16
        # patches at λ = 0.1, float32 alone has an error of 4e-5, and this leaves 2e-9 of it.
        rest = ordinary - solved.to(damped.dtype) @ damped
        solved = solved + _solved(rest.to(dtype), factor)
    solved = solved + _poison(damping, info).to(dtype)
    return solved.reshape(gradient.shape).to(gradient.dtype)


def dual_gradient(
    delta: Tensor,
    call: LinearCall,
    settings: Settings,
    dtype: torch.dtype,
    observe: Observer | None = None,
) -> Tensor:
    """Return ((XXᵀ / rows + λI)⁻¹ δ)ᵀ X, the same gradient from that of the layer's output.

    Args:
        delta: δ, the gradient of the layer's output.
        call: the call, with fewer rows than features and at least one.
        settings: λ and how it damps.
        dtype: of the result.
        observe: is shown the mean square of the input.

    Returns:
        The gradient of the weight in its own shape, (out, ...).

    """
    rows, groups = count_rows(call), call.groups
    with torch.autocast(delta.device.type, enabled=False):
        x = unfolded(call, torch.promote_types(call.input.dtype, torch.float32))
        if call.convolution is not None and delta.dim() == len(call.convolution.kernel) + 2:
            delta = delta.movedim(0, 1)  # (out, batch, *output), as X has its rows
        channels_last = call.convolution is None
        delta = delta.reshape(rows, -1) if channels_last else delta.reshape(len(delta), -1).T
        delta = delta.reshape(rows, groups, -1).transpose(0, 1)
        moment = moment_of(call, settings, x=x)
        if observe is not None:
            observe(moment.trace.flatten() / call.in_features)
        damped, damping = moment.damped(settings)
        exact = torch.float64 if has_fast_float64(x.device) else x.dtype
        factor, info = torch.linalg.cholesky_ex(damped.to(exact))
        # LAPACK's solve takes five times as long for the 64 × 64 matrix of an MLP's batch.
        inverse = torch.cholesky_inverse(factor) + _poison(damping, info).to(exact)
        solved = torch.bmm(inverse, delta.to(exact))
        gradient = torch.bmm(solved.to(x.dtype).mT, x)
    return gradient.reshape(call.weight.shape).to(dtype)


def _woodbury(gradient: Tensor, call: LinearCall, settings: Settings) -> Tensor:
    """Return (∇W − ∇W·Xᵀ (XXᵀ / rows + λI)⁻¹ X / rows) / λ, in the widest dtype, as it cancels."""
    groups, features = call.groups, call.in_features
    wide = widest_dtype(gradient.device)
    x = unfolded(call, wide)
    ordinary = gradient.reshape(groups, -1, features).to(wide)
    moment = _moment_in(wide, call, x)
    damped, damping = moment.damped(settings)
    factor, info = torch.linalg.cholesky_ex(damped)
    seen = _solved(ordinary @ x.mT, factor) @ x / count_rows(call)
    corrected = (ordinary - seen) / damping + _poison(damping + moment.trace, info)
    return corrected.reshape(gradient.shape).to(gradient.dtype)


def _solved(rows: Tensor, factor: Tensor) -> Tensor:
    """Return rows · (LLᵀ)⁻¹ of a Cholesky factor L, (groups, n, n), and rows (groups, out, n).

    As fast as ``torch.cholesky_solve``, for which MPS has no kernel in torch 2.11.
    """
    half = torch.linalg.solve_triangular(factor.mT, rows, upper=True, left=False)
    solved: Tensor = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    return solved


def _poison(damping: Tensor, info: Tensor) -> Tensor:
    """Return what to add to a result, (groups, 1, 1): 0, or NaN where it is none.

    A factorisation that met a NaN or an overflow leaves finite numbers behind. ∞ − ∞ and 0 / 0
    (where a matrix was not positive definite) are NaN, without a look at the numbers.
    """
    return (damping - damping) / (info == 0)[:, None, None]


def _moment_in(dtype: torch.dtype, call: LinearCall, x: Tensor | None = None) -> Moment:
    rows, features = count_rows(call), call.in_features
    if x is not None:
        sums, rounded = gram_of_columns(x.to(dtype))
        if has_fast_float64(x.device):
            return Moment(sums, rows, features, torch.finfo(dtype).eps, rounded)
        # It is factorised in the dtype of x there, which rounds all of it.
        return Moment(sums, rows, features, torch.finfo(x.dtype).eps)
    eps = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps
    return Moment(gram_matrix(call, dtype), rows, features, eps)


def _trace(matrix: Tensor) -> Tensor:
    """(groups, n, n) → (groups, 1, 1)."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def has_no_values(tensor: Tensor) -> bool:
    """Whether a tensor only has a shape: of the meta device, or one of torch's fake tensors."""
    return tensor.is_meta or type(tensor).__name__ == "FakeTensor"


def in_transform() -> bool:
    """Whether a transform of torch.func runs. It has no public way to ask."""
    functorch = torch._C._functorch
    # Not `is not None`: in a graph that is compiled, the class alone is known of what this returns.
    return isinstance(functorch.peek_interpreter_stack(), functorch.CInterpreter)


@custom_op("tract_hub::weight_gradient", mutates_args=())
def _weight_gradient(
    gradient: Tensor,
    input: Tensor,
    size: list[int],
    geometry: list[int],
    operands: torch.dtype | None,
    lam: float,
    relative: bool,
    dual: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Run ``correct_gradient`` or ``dual_gradient`` in a compiled graph, as eager code does.

    A compiler would hold every piece of the unfolded input, and compile them anew for each size.

    Args:
        gradient: ∇W, or δ where ``dual``.
        input: of the layer.
        size: of the weight.
        geometry: of a convolution, as ``_flattened`` makes it; empty for a Linear.
        operands: the dtype that autocast multiplied the input in.
        lam: the damping λ.
        relative: whether it is relative.
        dual: which of the two functions to call.
        dtype: of the result.

    """
    shape = torch.empty(size, device="meta")
    call = LinearCall("", input, shape, _unflattened(geometry, tuple(size[2:])))
    settings = Settings(lam, damping="relative" if relative else "absolute")
    if dual:
        return dual_gradient(gradient, call, settings, dtype)
    # A compiler counts on the strides that register_fake tells.
    return correct_gradient(gradient, call, settings, operands).contiguous()


@_weight_gradient.register_fake
def _(gradient: Tensor, input: Tensor, size: list[int], *rest: Any) -> Tensor:
    return gradient.new_empty(size, dtype=rest[-1])  # the last argument is the dtype


def corrected(
    gradient: Tensor,
    call: LinearCall,
    settings: Settings,
    operands: torch.dtype | None,
    dtype: torch.dtype,
    dual: bool,
    observe: Observer | None,
) -> Tensor:
    """Return the corrected gradient of a call's weight, eager or in a compiled graph.

    A model on the meta device, or run to estimate memory, has no values: its gradient has a shape.

    Args:
        gradient: ∇W; δ where ``dual``.
        call: the call; of its weight, only the shape is read.
        settings: λ and how it damps.
        operands: the dtype that autocast multiplied the input in.
        dtype: of the weight.
        dual: whether ``gradient`` is that of the layer's output.
        observe: is shown the mean square of the input, in eager code.

    """
    if torch.compiler.is_compiling() or has_no_values(call.input):
        relative = settings.damping == "relative"
        size, geometry = list(call.weight.shape), _flattened(call.convolution)
        result: Tensor = torch.ops.tract_hub.weight_gradient(
            gradient, call.input, size, geometry, operands, settings.lam, relative, dual, dtype
        )
        return result
    if dual:
        return dual_gradient(gradient, call, settings, dtype, observe)
    return correct_gradient(gradient, call, settings, operands, observe)


def _flattened(convolution: Convolution | None) -> list[int]:
    if convolution is None:
        return []
    padding = [size for pair in convolution.padding for size in pair]
    return [*convolution.stride, *padding, *convolution.dilation, convolution.groups]


def _unflattened(geometry: list[int], kernel: tuple[int, ...]) -> Convolution | None:
    if not geometry:
        return None
    d = len(kernel)
    pairs = tuple(zip(geometry[d : 3 * d : 2], geometry[d + 1 : 3 * d : 2], strict=True))
    stride, dilation = tuple(geometry[:d]), tuple(geometry[3 * d : 4 * d])
    return Convolution(kernel, stride, pairs, dilation, geometry[-1])
