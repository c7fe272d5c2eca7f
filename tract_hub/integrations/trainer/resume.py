"""λ in the optimizer's checkpoints, so that a run that resumes with another one says so."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from tract_hub.errors import TractError, TractWarning
from tract_hub.surgery import status

KEY = "tract_lam"
"""In the first of ``optimizer.param_groups``, which no optimizer looks for."""

_TRACKED: WeakSet[Optimizer] = WeakSet()


def track(optimizer: Optimizer, model: nn.Module) -> None:
    """Have an optimizer save λ of its model, and compare it with what is loaded."""
    if optimizer in _TRACKED:
        return
    _TRACKED.add(optimizer)
    mark(optimizer, model)
    optimizer.register_state_dict_pre_hook(partial(mark, model=model))
    optimizer.register_load_state_dict_pre_hook(_refuse_other_groups)
    optimizer.register_load_state_dict_post_hook(partial(compare, model=model))


def mark(optimizer: Optimizer, model: nn.Module) -> None:
    """Note λ of a model, or that there is none, in the optimizer."""
    optimizer.param_groups[0][KEY] = _lam(model)


def compare(optimizer: Optimizer, model: nn.Module) -> None:
    """Say where an optimizer comes from a run with another λ than its model has now."""
    saved, lam = optimizer.param_groups[0].get(KEY), _lam(model)
    mark(optimizer, model)
    if saved != lam:
        warnings.warn(
            f"the checkpoint is {_run(saved)}; from here on, training is {_run(lam)}",
            TractWarning,
            stacklevel=2,
        )


def _run(lam: float | None) -> str:
    return "from an ordinary run" if lam is None else f"with TrAct, λ={lam:g}"


def _lam(model: nn.Module) -> float | None:
    return next((state.lam for state in status(model)), None)


def _refuse_other_groups(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    saved, own = len(state_dict["param_groups"]), len(optimizer.param_groups)
    if saved != own:
        raise TractError(
            f"the checkpoint's optimizer has {saved} groups of parameters, this run's {own}: "
            "stem_lr, stem_weight_decay and stem_optimizer make groups of their own, so pass them "
            "as in the run that is resumed"
        )
