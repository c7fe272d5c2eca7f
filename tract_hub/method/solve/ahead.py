"""Inverting the damped Gram matrix on a GPU before the gradient is there.

The matrix depends on the layer's input alone, and the gradient of a first layer comes last of all.
A factorisation is a long row of small kernels: on a stream beside the one that trains, they run in
the gaps of forward and backward, and what is left for the end is one product. As a graph that was
recorded before they cost the processor little, too, which is what small models wait for.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from tract_hub.method.gram.matrix import Gram
from tract_hub.method.solve.divide import invert, multiply
from tract_hub.method.streams import arrived, side_stream, streams_beside


@dataclass(frozen=True)
class Ahead:
    """An inverse that is on its way.

    Attributes:
        inverse: (groups, n, n); not to be read by another stream before ``ready``.
        ready: recorded behind it; None where it was made in line.

    """

    inverse: Tensor
    ready: torch.cuda.Event | None

    def times(self, gradient: Tensor) -> Tensor:
        """Return ∇W · (XᵀX / rows + λI)⁻¹, of the gradient's shape and dtype."""
        return multiply(gradient, arrived(self.inverse, self.ready))


def invert_ahead(gram: Gram, lam: float) -> Ahead:
    """Start to invert the damped Gram matrix of a tensor on a GPU; wait for nothing.

    Where there is no other stream to use, it is done in line.
    """
    device = gram.sums.device
    with torch.autocast(device.type, enabled=False):
        if not streams_beside(device):
            return Ahead(invert(gram, lam), None)
        stream = side_stream(device)
        if gram.ready is None:  # its sums come from the stream that trains
            stream.wait_stream(torch.cuda.current_stream(device))
            gram.sums.record_stream(stream)
        else:
            stream.wait_event(gram.ready)
        with _recordings, torch.cuda.stream(stream):
            recording = _recording(device, tuple(gram.sums.shape), gram.eps)
            inverse = recording.replay(gram, lam) if recording else invert(gram, lam)
            return Ahead(inverse, stream.record_event())


class _Recording:
    """The inversion of matrices of one shape, as a CUDA graph: one launch instead of thirty.

    Made and replayed on the side stream, by one thread at a time.
    """

    def __init__(self, device: torch.device, shape: tuple[int, ...], eps: float) -> None:
        self.moment = torch.eye(shape[-1], dtype=torch.float64, device=device).repeat(
            shape[0], 1, 1
        )
        self.lam = torch.ones((), dtype=torch.float64, device=device)
        gram = Gram(self.moment, 1, eps)
        invert(gram, self.lam)  # once as it is: libraries may not start while a graph is recorded
        # A graph keeps the address of the workspace that it was recorded with: let it have its own,
        # and leave it to no one else.
        torch._C._cuda_clearCublasWorkspaces()
        self.graph = torch.cuda.CUDAGraph()
        self.graph.capture_begin(capture_error_mode="thread_local")
        try:
            self.inverse = invert(gram, self.lam)
        finally:
            self.graph.capture_end()
            torch._C._cuda_clearCublasWorkspaces()

    def replay(self, gram: Gram, lam: float) -> Tensor:
        """Return what ``invert`` does."""
        torch.div(gram.sums, max(gram.rows, 1), out=self.moment)
        self.lam.fill_(lam)
        self.graph.replay()
        return self.inverse.clone()


_recordings = threading.Lock()


@functools.lru_cache(maxsize=32)
def _recording(device: torch.device, shape: tuple[int, ...], eps: float) -> _Recording | None:
    """Record once for each shape; None where it fails, as on a GPU whose memory is full."""
    try:
        return _Recording(device, shape, eps)
    except RuntimeError:
        return None
