"""A stream of a GPU beside the one that trains, and how work is handed to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def is_recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def streams_beside(device: torch.device) -> bool:
    """Whether another stream may be used: on NVIDIA's GPUs, where it was tried.

    A CUDA graph that records a forward alone must not leave another stream open.
    """
    return device.type == "cuda" and torch.version.hip is None and not is_recording(device)


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that all layers of a device share; its kernels go first."""
    with _making:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device, priority=-1)
        return _streams[device]


_making = threading.Lock()
_streams: dict[torch.device, torch.cuda.Stream] = {}


def arrived(tensor: Tensor, ready: torch.cuda.Event | None) -> Tensor:
    """Return a tensor that was made beside, as soon as the current stream may read it."""
    if ready is not None:
        current = torch.cuda.current_stream(tensor.device)
        current.wait_event(ready)
        tensor.record_stream(current)
    return tensor


class Relay:
    """Hands copies of a layer's input, piece by piece, to the stream beside.

    The input itself may be overwritten as soon as the forward is over, so it is the stream that
    trains that reads it. There are two buffers for the copies, which take turns: what is in one is
    multiplied while the other is filled, and memory does not grow with the batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = side_stream(device) if streams_beside(device) else None
        self._buffers: list[Tensor | None] = [None, None]
        self._read: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def copy(self, view: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy a piece, contiguous and in a dtype; it is there until the next but one is made."""
        self._turn = 1 - self._turn
        read, buffer = self._read[self._turn], self._buffers[self._turn]
        if read is not None:
            torch.cuda.current_stream(view.device).wait_event(read)
        if buffer is None or buffer.numel() < view.numel():
            buffer = view.new_empty(view.numel(), dtype=dtype)
            if self._side is not None:
                buffer.record_stream(self._side)
            self._buffers[self._turn] = buffer
        return buffer[: view.numel()].view(view.shape).copy_(view)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work on the piece that was copied last, on the stream beside if there is one."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            yield
            self._read[self._turn] = self._side.record_event()

    @property
    def ready(self) -> torch.cuda.Event | None:
        """Recorded behind all work so far; None where there is no stream beside."""
        return self._read[self._turn]
