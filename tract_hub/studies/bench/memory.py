"""The most memory that a training step of one stem takes."""

from __future__ import annotations

import re
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tract_hub.errors import StudyError
from tract_hub.studies.bench.arms import ARMS, Setup, installed

BATCHES = (64, 128, 256)
_STEPS = 2
_ON_CPU = Setup(torch.device("cpu"))
_HIGH_WATER = re.compile(r"VmHWM:\s+(\d+) kB")


def peak_memory() -> dict[str, dict[int, float]]:
    """Measure a 7 × 7 stem of stride 2 alone at 224 × 224 pixels, on the CPU.

    Each arm and batch runs in a process of its own, whose highest resident memory Linux notes.

    Returns:
        For each arm, by batch size, the peak in MiB.

    Raises:
        StudyError: a process was killed, perhaps for want of memory, or its peak is not noted.

    """
    context = get_context("spawn")
    peaks: dict[str, dict[int, float]] = {arm: {} for arm in installed()}
    for batch in BATCHES:
        for arm in peaks:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_train_stem, args=(arm, batch, sender))
            process.start()
            sender.close()
            try:
                peaks[arm][batch] = receiver.recv()
            except EOFError as error:
                raise StudyError(
                    f"{arm} did not survive a batch of {batch} images: add --no-memory"
                ) from error
            process.join()
    return peaks


def peak_memory_of_gpu(setup: Setup) -> dict[str, dict[int, float]]:
    """Measure the same stem on a GPU: the most that torch had allocated, in MiB.

    The authors' package has no entry where it cannot step in this form.
    """
    peaks: dict[str, dict[int, float]] = {}
    for arm in installed():
        try:
            peaks[arm] = {batch: _allocated(arm, batch, setup) for batch in BATCHES}
        except Exception:
            if arm != "torch_tract":
                raise
    return peaks


def _allocated(arm: str, batch: int, setup: Setup) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(setup.device)
    _step(arm, batch, setup)
    return torch.cuda.max_memory_allocated(setup.device) / 2**20


def _train_stem(arm: str, batch: int, sender: Any) -> None:
    torch.set_num_threads(1)
    for each in installed():
        _step(each, 1)  # what an arm imports is no part of its step
    _step(arm, batch)
    status = Path("/proc/self/status")
    found = _HIGH_WATER.search(status.read_text()) if status.exists() else None
    if found:
        sender.send(int(found[1]) / 1024)
    sender.close()


def _step(arm: str, batch: int, setup: Setup = _ON_CPU) -> None:
    torch.manual_seed(0)
    form = torch.channels_last if setup.channels_last else torch.contiguous_format
    stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    model = ARMS[arm](nn.Sequential(stem).to(setup.device).to(memory_format=form))
    images = torch.randn(batch, 3, 224, 224).to(setup.device, memory_format=form)
    for _ in range(_STEPS):
        model.zero_grad()
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.bf16):
            output = model(images)
        output.sum().backward()
