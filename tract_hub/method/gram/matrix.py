"""The Gram matrix of a layer's input: what the gradient is divided by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tract_hub.method.gram.half import half_gram
from tract_hub.method.gram.panels import LARGE, gram_panels, mirrored
from tract_hub.method.gram.patches import count_rows, row_chunks
from tract_hub.method.gram.precision import Precision, precision_for, widest
from tract_hub.method.gram.sight import Sight, sight_of
from tract_hub.method.gram.sliding import slides, sliding_gram
from tract_hub.method.operations import LinearCall
from tract_hub.method.streams import arrived, is_recording

ROUNDING = 8
"""Rounding errors of a Gram matrix, in units of eps × trace."""


@dataclass(frozen=True)
class Gram:
    """Sum of xxᵀ over the rows x of one or several inputs.

    Attributes:
        sums: (groups, n, n), float64 where the device has it; not divided by the rows.
        rows: how many rows were summed.
        eps: the rounding unit of the products that were summed.
        ready: recorded behind the sums where they are computed beside the stream that trains.

    """

    sums: Tensor
    rows: int
    eps: float
    ready: torch.cuda.Event | None = None

    @property
    def total(self) -> Tensor:
        """The sums, as soon as they may be read on the current stream."""
        return arrived(self.sums, self.ready)

    def rounding(self) -> Tensor:
        """Bound the rounding errors of each group's XᵀX / rows, as an eigenvalue: (groups, 1, 1).

        Errors of a product that add up, at worst, are as large as the trace allows. The factor is
        twice what any of the inputs tried has shown: photographs, ramps, constants, noise.
        """
        trace = self.total.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (ROUNDING * self.eps / max(self.rows, 1) * trace)[:, None, None]

    def __add__(self, other: Gram) -> Gram:
        total, rows = self.total + other.total, self.rows + other.rows
        return Gram(total, rows, max(self.eps, other.eps))


def gram_of(call: LinearCall, lam: float, site: str | None = None) -> Gram:
    """Compute XᵀX of the unfolded input of one call, outside autograd and autocast.

    The unfolded input exists in pieces only, so the memory does not grow with the batch. A sum too
    rough for the damping λ is taken again in float64: on a CPU, where looking at a number costs
    nothing, whenever it is; on a GPU from the batch on that has shown it, see ``sight``.

    Args:
        call: of the layer.
        lam: the damping λ.
        site: what the layer is remembered by; None looks each time.

    """
    rows = count_rows(call)
    precision = precision_for(call, rows)
    if precision.looks == "sometimes":
        sight = Sight() if site is None else sight_of(site)
        return _watched(call, lam, rows, precision, sight)
    gram = _summed_in(precision, call, rows)
    rough = precision.looks == "always" and _is_rough(gram, lam, precision)
    return _summed_in(widest(rows), call, rows) if rough else gram


def _watched(call: LinearCall, lam: float, rows: int, precision: Precision, sight: Sight) -> Gram:
    """Look now and then; a graph that is being recorded shows nothing."""
    recording = is_recording(call.input.device)
    known = sight.rounding
    rough = recording if known is None else precision.rough * known > lam
    if not rough:
        gram = _summed_in(precision, call, rows)
        if recording or not sight.is_due():
            return gram
        sight.see(gram.rounding())
        if not _is_rough(gram, lam, precision):
            return gram
    return _summed_in(widest(rows), call, rows)


def _is_rough(gram: Gram, lam: float, precision: Precision) -> bool:
    return bool((precision.rough * gram.rounding() > lam).any())


def _summed_in(precision: Precision, call: LinearCall, rows: int) -> Gram:
    with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
        if precision.half:
            sums, ready = half_gram(call, precision)
            return Gram(sums, rows, precision.eps, ready)
        return Gram(_total(call, rows, precision), rows, precision.eps)


def _total(call: LinearCall, rows: int, precision: Precision) -> Tensor:
    if call.convolution is not None and rows and goes_by_lines(call):
        return sliding_gram(call, call.convolution, precision)
    return _summed(call, precision)


def goes_by_lines(call: LinearCall) -> bool:
    """Whether products of image lines cost less than those of the unfolded input.

    They do not where windows share nothing and the symmetry of a large matrix saves more.
    """
    convolution = call.convolution
    shares = convolution is not None and convolution.kernel[0] > convolution.stride[0]
    return slides(call) and (shares or call.in_features < LARGE)


def _summed(call: LinearCall, precision: Precision) -> Tensor:
    panels: list[Tensor] = []
    for piece in row_chunks(call):
        added = gram_panels(call.as_used(piece).to(precision.products), precision)
        panels = [a + b for a, b in zip(panels, added, strict=True)] if panels else added
    return mirrored(panels)
