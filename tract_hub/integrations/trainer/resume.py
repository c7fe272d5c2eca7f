"""λ beside the optimizer's state in checkpoints: a run that resumes with another one says so."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tract_hub.errors import TractError, TractWarning
from tract_hub.surgery import status

KEY = "tract_lam"
"""In ``optimizer.state_dict()``, which optimizers pass over. Not in one of its groups: torch's
distributed checkpoints refuse groups with other keys than those of the optimizer that loads."""

_TRACKED: WeakSet[Optimizer] = WeakSet()
_COMPARED: WeakSet[Optimizer] = WeakSet()


def track(optimizer: Optimizer, model: nn.Module) -> None:
    """Have an optimizer save λ of its model, and compare it with what is loaded."""
    if optimizer in _TRACKED:
        return
    _TRACKED.add(optimizer)
    optimizer.register_state_dict_post_hook(partial(_save, model=model))
    optimizer.register_load_state_dict_pre_hook(_refuse_other_groups)
    optimizer.register_load_state_dict_pre_hook(partial(_compare, model=model))


def was_compared(optimizer: Optimizer | None) -> bool:
    """Whether a change of λ was reported when the optimizer was loaded, if there was one."""
    return optimizer in _COMPARED


def report_change(before: str, lam: float | None) -> None:
    """Say that a run goes on with another gradient than the one that it resumes."""
    warnings.warn(
        f"the checkpoint is from {before}; from here on, training is {_with(lam)}",
        TractWarning,
        stacklevel=3,
    )


def lam_of(model: nn.Module) -> float | None:
    """Return λ of a model; None where TrAct is off."""
    return next((state.lam for state in status(model)), None)


def _with(lam: float | None) -> str:
    return "ordinary" if lam is None else f"with TrAct, λ={lam:g}"


def _save(optimizer: Optimizer, state_dict: dict[str, Any], model: nn.Module) -> None:
    state_dict[KEY] = lam_of(model)


def _compare(optimizer: Optimizer, state_dict: dict[str, Any], model: nn.Module) -> None:
    if _is_sharded(model):  # torch makes the state dict anew from files that do not have the key
        return
    _COMPARED.add(optimizer)
    saved, lam = state_dict.get(KEY), lam_of(model)
    if saved != lam:
        report_change("an ordinary run" if saved is None else f"a run {_with(saved)}", lam)


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters()) or any(
        isinstance(module, FullyShardedDataParallel) for module in model.modules()
    )


def _refuse_other_groups(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    saved, own = len(state_dict["param_groups"]), len(optimizer.param_groups)
    if saved != own:
        raise TractError(
            f"the checkpoint's optimizer has {saved} groups of parameters, this run's {own}: "
            "stem_lr, stem_weight_decay and stem_optimizer make groups of their own, so pass them "
            "as in the run that is resumed"
        )
