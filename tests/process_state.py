"""What a process is like, apart from its models: for tests that nothing of it changes."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.nn.modules.module as hooks_of_modules
import torch.optim.optimizer as hooks_of_optimizers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback


def state_of_process() -> dict[str, Any]:
    """Whatever another model or library could notice, in values that can be compared."""
    classes = (nn.Module, nn.Conv2d, torch.optim.Optimizer, torch.optim.SGD, Trainer)
    classes += (TrainerCallback, Tensor, torch.autograd.Function)
    tables = {
        f"{module.__name__}.{name}": list(table.values())
        for module in (hooks_of_modules, hooks_of_optimizers)
        for name, table in vars(module).items()
        if name.startswith("_global") and isinstance(table, dict)
    }
    assert len(tables) >= 8  # a torch that names them otherwise
    numbers, *rest = np.random.get_state()[1:]
    return {
        **tables,
        **{kind.__name__: dict(vars(kind)) for kind in classes},
        "dynamo": torch._dynamo.config.get_config_copy(),
        "random": (torch.get_rng_state().tolist(), random.getstate(), numbers.tolist(), rest),
        "modes": torch.overrides._get_current_function_mode_stack(),
        "dispatch": torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "numbers": (torch.get_default_dtype(), torch.get_float32_matmul_precision()),
        "warnings": (list(warnings.filters), warnings.showwarning),
    }
