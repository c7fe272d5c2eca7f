"""The wrappers that average gradients over processes: when each of them does, and among whom.

A wrapper is found where it stands while a forward runs, among the callers: that holds whether
TrAct was enabled on the wrapper, on the model inside, or before there was a wrapper.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from tract_hub.errors import TractError
from tract_hub.method.step.ledger import Ledger
from tract_hub.method.step.synchroniser import Synchroniser


def find_synchroniser() -> Synchroniser | None:
    """Find the wrapper whose forward runs now; None if there is none among several processes."""
    for caller in _callers():
        for cls, synchroniser in _SYNCHRONISERS.items():
            if isinstance(caller, cls):
                found: Synchroniser = synchroniser(caller)
                return found
        if any(cls.__name__ == "DeepSpeedEngine" for cls in type(caller).__mro__):
            return _DeepSpeed(caller)
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return None if several else Synchroniser()


class _DDP(Synchroniser):
    """Decides in the forward; a second backward through its graph is not synchronised."""

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        if wrapper._join_config.enable:
            raise TractError(
                "scope='global' cannot sum rows with processes that have joined: leave join() out, "
                "give every process as many batches, or pass scope='rank'"
            )
        super().__init__([wrapper.process_group])
        self._due = bool(wrapper.require_backward_grad_sync)

    def synchronises(self) -> bool:
        due, self._due = self._due, False
        return due


class _FSDP2(Synchroniser):
    """Decides in the backward; until then, gradients wait outside of ``.grad``."""

    def __init__(self, wrapper: FSDPModule) -> None:
        self._param_groups = list(_param_groups(wrapper))
        mesh = self._param_groups[0].mesh_info
        names = ("shard_process_group", "replicate_process_group")
        super().__init__([getattr(mesh, name) for name in names if hasattr(mesh, name)])

    def synchronises(self) -> bool:
        return all(group.reduce_grads and group.all_reduce_grads for group in self._param_groups)

    def discarded(self, ledger: Ledger) -> bool:
        sharded = (p.sharded_param for group in self._param_groups for p in group.fsdp_params)
        return not ledger.holds and all(parameter.grad is None for parameter in sharded)


class _FSDP1(Synchroniser):
    """Decides in the backward, and puts ``.grad`` aside while it runs."""

    def __init__(self, wrapper: FullyShardedDataParallel) -> None:
        self._wrapper = wrapper
        inter_node = getattr(wrapper, "_inter_node_pg", None)
        super().__init__([group for group in (wrapper.process_group, inter_node) if group])

    def synchronises(self) -> bool:
        return bool(self._wrapper._sync_gradients)

    def discarded(self, ledger: Ledger) -> bool:
        handles = (m._handle for m in FullyShardedDataParallel.fsdp_modules(self._wrapper))
        flat = (handle.flat_param for handle in handles if handle is not None)
        return not ledger.holds and all(
            parameter.grad is None and getattr(parameter, "_saved_grad_shard", None) is None
            for parameter in flat
        )


class _DeepSpeed(Synchroniser):
    """Averages at the end of an accumulation, with a step; keeps gradients of its own."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        super().__init__([engine.data_parallel_group])

    def synchronises(self) -> bool:
        return bool(self._engine.is_gradient_accumulation_boundary())

    def discarded(self, ledger: Ledger) -> bool:
        return not ledger.holds


_SYNCHRONISERS: dict[type, Any] = {
    DistributedDataParallel: _DDP,
    FSDPModule: _FSDP2,
    FullyShardedDataParallel: _FSDP1,
}


def _callers() -> Iterator[nn.Module]:
    """The modules whose methods run now, innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module):
            yield caller
        frame = frame.f_back


def _param_groups(wrapper: Any) -> Iterator[Any]:
    for module in wrapper.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            # torch 2.11 has at most one
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            yield from (group for group in groups if group is not None)
