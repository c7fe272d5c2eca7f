"""One step of a model: which rows its backwards have seen, and when they are summed."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from tract_hub.errors import TractError
from tract_hub.method import engine
from tract_hub.method.gram.matrix import Gram
from tract_hub.method.measure import measure
from tract_hub.method.solve.divide import divide_by_gram
from tract_hub.method.step.ledger import Ledger
from tract_hub.method.step.optimizers import end_with_optimizer
from tract_hub.method.step.synchroniser import GroupSum, Synchroniser

Finder = Callable[[], Synchroniser | None]
"""Finds what synchronises the forward that runs now; None: nothing, in one of several processes."""


class Step:
    """Gates whose Gram matrices are summed over processes and over the backwards of a step.

    Nothing is communicated but in a backward that the model's wrapper synchronises too, once, as
    soon as it reaches the model's output: there every process knows the rows it will go through.

    Args:
        ledgers: one for each first layer, by its weight's name.
        find: finds what synchronises the model.

    """

    def __init__(self, ledgers: dict[str, Ledger], find: Finder) -> None:
        self.ledgers = ledgers
        self.find = find
        self._gates: weakref.WeakSet[Any] = weakref.WeakSet()  # of graphs that still exist
        self._forward: Synchroniser | None = None
        self._backward = -1
        self._sum: GroupSum | None = None  # None: this backward is not synchronised
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Step, (self.ledgers, self.find)

    @_disable_dynamo
    def enter(self) -> None:
        """Begin a forward of the whole model."""
        self._forward = self.find() if torch.is_grad_enabled() else None

    @_disable_dynamo
    def leave(self, output: Any) -> None:
        """End it; have a backward reported that reaches its output.

        A process whose forward did not use the weight takes part with no rows.
        """
        synchroniser, self._forward = self._forward, None
        if synchroniser is None or not synchroniser.groups or not torch.is_grad_enabled():
            return
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(partial(self._reach_output, synchroniser))

    @_disable_dynamo
    def gate(
        self,
        weight: Tensor,
        gram: Gram,
        lam: float,
        name: str,
        module: nn.Module,
        probe: Tensor | None = None,
    ) -> Tensor:
        """Return a weight whose gradient is that of the step.

        Args:
            weight: (out, ...) of ``groups × n`` features in all.
            gram: the Gram matrix of the input that it is applied to.
            lam: the damping λ.
            name: the weight's name among the ledgers.
            module: the module that applies it.
            probe: a leaf whose gradient becomes what ``measure`` says about the whole step's.

        """
        if engine.in_transform():
            raise TractError("scope='global' knows no torch.func transforms: pass scope='rank'")
        _require_process_group()
        ledger = self.ledgers[name]
        ledger.holders.add(module)
        end_with_optimizer(ledger)
        synchroniser = self._forward or self.find()
        gated: Tensor = _CorrectStep.apply(weight, self, ledger, gram, lam, synchroniser, probe)
        return gated

    def remember(self, gate: Any) -> None:
        """Know a gate for as long as its graph exists."""
        self._gates.add(gate)

    def correct(self, gate: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what a gate's ordinary gradient becomes, and what its probe is told."""
        with self._lock:
            ledger: Ledger = gate.ledger
            if not engine.accumulates():
                return divide_by_gram(gradient, self._rows_of_backward(ledger), gate.lam), None
            self._start(gate.synchroniser, gradient.device)
            if self._sum is None:
                return ledger.hold(gradient), None
            sums = dict(zip(self.ledgers.values(), self._sum.result(), strict=True))[ledger]
            answer, whole = ledger.settle(gradient, sums.to(gradient.device), gate.lam)
            return answer, measure(*whole, gate.lam) if gate.probed else None

    def _reach_output(self, synchroniser: Synchroniser, gradient: Tensor) -> None:
        with self._lock:
            if engine.accumulates():
                self._start(synchroniser, gradient.device)

    def _start(self, synchroniser: Synchroniser | None, device: torch.device) -> None:
        """Once a backward: count its rows, and start to sum them if this is the time."""
        if self._backward == engine.running_backward():
            return
        if synchroniser is None:
            raise TractError(
                "scope='global' met, in one of several processes, the backward of a forward that "
                "no wrapper ran which averages gradients: train through DistributedDataParallel, "
                "FSDP or Accelerate, checkpoint with use_reentrant=False, or pass scope='rank'"
            )
        self._backward = engine.running_backward()
        self._finish()
        for ledger in self.ledgers.values():
            if ledger.sums is not None and synchroniser.discarded(ledger):
                ledger.clear()
        for gate in self._running_gates():
            self._count(gate)
        if synchroniser.synchronises():
            parts = [ledger.packed(device) for ledger in self.ledgers.values()]
            self._sum = GroupSum(parts, synchroniser.groups)

    def _finish(self) -> None:
        if self._sum is not None:
            self._sum.result()
        self._sum = None

    def _running_gates(self) -> list[Any]:
        return [gate for gate in self._gates if engine.will_run(gate)]

    def _count(self, gate: Any) -> None:
        gate.ledger.meet(engine.leaves(gate))
        if not gate.counted:
            gate.counted = True
            gate.ledger.add(gate.gram)

    def _rows_of_backward(self, ledger: Ledger) -> Gram:
        grams: list[Gram] = [gate.gram for gate in self._running_gates() if gate.ledger is ledger]
        return sum(grams[1:], start=grams[0])


class _CorrectStep(engine.Gate):
    """∇W ↦ what makes the gradient of the step complete."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Step,
        ledger: Ledger,
        gram: Gram,
        lam: float,
        synchroniser: Synchroniser | None,
        probe: Tensor | None,
    ) -> Tensor:
        ctx.probed = probe is not None
        ctx.step, ctx.ledger, ctx.gram, ctx.lam = step, ledger, gram, lam
        ctx.synchroniser, ctx.counted = synchroniser, False
        step.remember(ctx)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        corrected, probed = ctx.step.correct(ctx, gradients[0])
        return corrected, None, None, None, None, None, probed


def _require_process_group() -> None:
    """Processes that were started together and do not know each other would each train alone."""
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and not (dist.is_available() and dist.is_initialized()):
        raise TractError(
            f"scope='global' in one of {started} processes (WORLD_SIZE), but torch.distributed has "
            "no process group: call torch.distributed.init_process_group or pass scope='rank'"
        )


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif is_dataclass(output):
        yield from _tensors([getattr(output, field.name) for field in fields(output)])
