"""A step of a weight ends where an optimizer moves it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tract_hub.errors import TractError
from tract_hub.method.step.ledger import Ledger

_open: weakref.WeakSet[Ledger] = weakref.WeakSet()
_hooks: list[Any] = []


def end_with_optimizer(ledger: Ledger) -> None:
    """Clear a ledger whenever an optimizer that has its weight has stepped."""
    _open.add(ledger)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_partial_step))
        _hooks.append(register_optimizer_step_post_hook(_end_step))


def _refuse_partial_step(optimizer: Optimizer, *_: Any) -> None:
    if any(ledger.holds for ledger in _ledgers_of(optimizer)):
        raise TractError(
            "scope='global' kept the first layer's gradient back for a backward that synchronises "
            "processes, and the optimizer steps without one: end each accumulation with a backward "
            "outside of no_sync(), or pass scope='rank'"
        )


def _end_step(optimizer: Optimizer, *_: Any) -> None:
    for ledger in _ledgers_of(optimizer):
        ledger.clear()


def _ledgers_of(optimizer: Optimizer) -> Iterator[Ledger]:
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for ledger in list(_open):
        if any(id(tensor) in moved for tensor in _tensors(ledger)):
            yield ledger


def _tensors(ledger: Ledger) -> Iterator[Any]:
    """The tensors that an optimizer may have: a wrapper may have put others in their place."""
    yield from ledger.leaves
    for module in ledger.holders:
        yield from nn.Module.parameters(module)
