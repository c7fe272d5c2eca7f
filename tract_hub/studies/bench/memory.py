"""The most memory that a training step of one stem takes."""

from __future__ import annotations

import re
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tract_hub.errors import StudyError
from tract_hub.studies.bench.arms import ARMS, installed

BATCHES = (64, 128, 256)
_STEPS = 2
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


def _step(arm: str, batch: int) -> None:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    model = ARMS[arm](nn.Sequential(stem))
    images = torch.randn(batch, 3, 224, 224)
    for _ in range(_STEPS):
        model.zero_grad()
        model(images).sum().backward()
