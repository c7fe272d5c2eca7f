"""An Accelerator on the device and in the precision that were asked for."""

from __future__ import annotations

import os
from typing import Any

from tract_hub.errors import SettingsError, first_line
from tract_hub.studies.machine import check_there

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(device: str, precision: str, batch_size: int) -> Any:
    """Return an ``accelerate.Accelerator``; a batch is shared among its processes.

    Args:
        device: ``"auto"`` leaves it to Accelerate; else a torch device such as ``"cuda:1"``.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        batch_size: of all processes together.

    Raises:
        SettingsError: no such device here, or it cannot do this.

    """
    if device.startswith("cuda:") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError(
            f"--device {device} is one device; for a launcher's processes, pass --device auto"
        )
    if device != "auto":
        check_there(device)
    accelerator = _accelerator(device, precision)
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise SettingsError("--precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
    if batch_size % accelerator.num_processes:
        raise SettingsError(
            f"--batch-size {batch_size} cannot be shared by {accelerator.num_processes} processes; "
            "choose a multiple"
        )
    return accelerator


def _accelerator(device: str, precision: str) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, patch_environment

    loading = DataLoaderConfiguration(split_batches=True)
    # Accelerate's own way to name a device.
    named = {} if device in ("auto", "cpu") else {"ACCELERATE_TORCH_DEVICE": device}
    try:
        with patch_environment(**named):
            return Accelerator(
                cpu=device == "cpu", mixed_precision=MIXED[precision], dataloader_config=loading
            )
    except (ValueError, ImportError) as error:
        raise SettingsError(
            f"--precision {precision} does not work here, try another: {first_line(error)}"
        ) from error
