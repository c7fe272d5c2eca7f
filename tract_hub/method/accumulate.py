"""``scope="global"``: one Gram matrix over all processes and all backwards of a step.

The correction is linear in the gradient. So the ordinary gradient travels: DistributedDataParallel
and FSDP2 average it, accumulation adds it up, GradScaler scales it. Meanwhile each backward adds
its XᵀX to a sum. Before the optimizer's step, the sums of all processes are added by one all-reduce
and the gradient is corrected once, as K-FAC does.
"""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tract_hub.config import Settings
from tract_hub.errors import TractError
from tract_hub.method.calls import LinearCall
from tract_hub.method.correct import Moment, divide, has_no_values
from tract_hub.method.gram import (
    count_rows,
    gram_matrix,
    has_fast_float64,
    product_dtype,
    widest_dtype,
)


class Accumulator:
    """The sum of XᵀX of one weight since the last step.

    Args:
        module: holds the weight.
        name: of the parameter in that module.
        weight_name: of the parameter in the model, for messages.
        shape: groups and features n of the Gram matrix.
        settings: λ and how it damps.

    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        weight_name: str,
        shape: tuple[int, int],
        settings: Settings,
    ) -> None:
        self.module = module
        self.name = name
        self.weight_name = weight_name
        self.shape = shape
        self.settings = settings
        self.sums: Tensor | None = None
        self.rows = 0
        self.eps = 0.0
        self.transposed = False  # whether the weight is (n, out), as that of a matmul
        self._seen = -1  # the version of .grad that the last backward left
        self._at_rest = 0  # ``id``: no weakly referenced tensor can be swapped, see ``_watch``
        self._weight_version = 0  # of the weight when the first rows of the step were added

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now: sharding puts another in its place."""
        return self.module.get_parameter(self.name)

    def add(self, call: LinearCall, operands: torch.dtype | None) -> None:
        """Add the rows of one call, in its backward."""
        if has_no_values(call.input):
            return
        self._refuse_unfinished_step()
        if self._was_discarded():
            self.clear()
        dtype = product_dtype(call.input, operands)
        if dtype == torch.float32 and has_fast_float64(call.input.device):
            dtype = torch.float64  # nobody looks whether the damping is too small for float32
        rows = count_rows(call)
        with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
            if rows:
                sums = gram_matrix(call, dtype)
                self.sums = sums if self.sums is None else self.sums + sums
        self.rows += rows
        self.eps = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps

    def note_parameter(self) -> None:
        """Remember the parameter outside of forward and backward: the one an optimizer holds."""
        self._at_rest = id(self.parameter)

    def note_gradient(self, parameter: Tensor) -> None:
        """Remember the gradient that a backward left; a hook of the parameter."""
        self._seen = -1 if parameter.grad is None else parameter.grad._version

    def clear(self) -> None:
        """Begin a new step."""
        self.sums, self.rows, self._seen = None, 0, -1

    def packed(self, device: torch.device) -> Tensor:
        """Return the sums and the number of rows as one flat tensor."""
        groups, features = self.shape
        wide = widest_dtype(device)
        sums = self.sums
        if sums is None:
            sums = torch.zeros(groups, features, features, dtype=wide, device=device)
        return torch.cat([sums.flatten().to(device, wide), sums.new_full((1,), self.rows)])

    def finish(self, packed: Tensor) -> None:
        """Correct the gradient by the sums of all processes."""
        groups, features = self.shape
        parameter = self.parameter
        gradient = parameter.grad
        if gradient is None and _is_of_deepspeed(parameter):
            gradient = importlib.import_module("deepspeed.utils").safe_get_full_grad(parameter)
        if gradient is not None and not has_no_values(gradient):
            packed = packed.to(gradient.device)  # FSDP2 may keep gradients on the CPU
            rows = packed[-1]
            sums = packed[:-1].view(groups, features, features)
            eps = self.eps or torch.finfo(packed.dtype).eps
            moment = Moment(sums, rows.clamp_min(1), features, eps)
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # a DTensor
            if groups > 1 and len(local) != len(gradient):
                self.clear()
                raise TractError(
                    f"{self.weight_name!r} has {groups} groups, and FSDP2 shards it across them: "
                    "pass scope='local'"
                )
            with torch.no_grad(), torch.autocast(local.device.type, enabled=False):
                local = local.mT if self.transposed else local
                corrected = divide(local, moment, self.settings)
                local.copy_(torch.where(rows > 0, corrected, local))
            if parameter.grad is None:
                importlib.import_module("deepspeed.utils").safe_set_full_grad(parameter, gradient)
        self.clear()

    def _refuse_unfinished_step(self) -> None:
        """Tell an optimizer that is not torch's, as fastai's, and has made a step without rows."""
        parameter = self.parameter
        if self._at_rest != id(parameter):
            return
        if self.rows and parameter._version != self._weight_version:
            self.clear()
            raise TractError(
                f"{self.weight_name!r} was changed by its ordinary gradient: torch's hooks do not "
                "see the step of this optimizer. Call tract_hub.finish(model) after the last "
                "backward of each step, or pass scope='local'"
            )
        if not self.rows:
            self._weight_version = parameter._version

    def _was_discarded(self) -> bool:
        """Whether the gradient that belongs to the sums was zeroed, as after a skipped step."""
        parameter = self.parameter
        if self.rows == 0 or self._seen < 0:
            return False
        if self._at_rest != id(parameter):
            return False  # FSDP2 keeps the gradient elsewhere
        if _is_of_deepspeed(parameter):
            return False  # and so does ZeRO
        gradient = parameter.grad
        if gradient is None:
            return True
        return gradient._version != self._seen and not bool(gradient.any())


_live: weakref.WeakSet[Accumulator] = weakref.WeakSet()
_hooks: list[Any] = []


def join(accumulator: Accumulator) -> None:
    """Complete this weight's gradient before each step of an optimizer that holds it.

    Called by a forward that trains, not by ``enable``: torch has no hook for the step of an
    optimizer that is not known yet but one for all optimizers. It is removed by the last ``leave``.

    Raises:
        TractError: this is one of several processes, which do not know each other.

    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and not (dist.is_available() and dist.is_initialized()):
        raise TractError(
            f"scope='global' in one of {started} processes (WORLD_SIZE), but torch.distributed has "
            "no process group: call torch.distributed.init_process_group or pass scope='local'"
        )
    if accumulator not in _live:
        _live.add(accumulator)
        weakref.finalize(accumulator, _remove_idle_hooks)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def leave(accumulator: Accumulator) -> None:
    """Stop completing the gradients of this weight."""
    _live.discard(accumulator)
    _remove_idle_hooks()


def finish_step(accumulators: Iterable[Accumulator]) -> None:
    """Correct the gradients of a step; every process has to call it, with the same weights.

    A second call in the same step finds no rows and changes nothing. It still sums over the
    processes: none of them knows whether the others have seen rows.
    """
    ready = sorted(accumulators, key=lambda accumulator: accumulator.weight_name)
    if not ready:
        return
    device = next((a.sums.device for a in ready if a.sums is not None), ready[0].parameter.device)
    parts = [accumulator.packed(device) for accumulator in ready]
    flat = torch.cat(parts)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    for accumulator, packed in zip(ready, flat.split([len(p) for p in parts]), strict=True):
        accumulator.finish(packed)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for accumulator in _live:
        if accumulator.rows and _is_of_deepspeed(accumulator.parameter):
            raise TractError(
                f"DeepSpeed steps with the ordinary gradient of {accumulator.weight_name!r}: "
                "call tract_hub.finish(model) between engine.backward(loss) and engine.step(), or "
                "pass scope='local', as with Accelerate, which makes the step in its backward"
            )
    held = _held_by(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:  # else the last backward of the step is yet to run, in the closure
        finish_step(held)
    for accumulator in held:
        accumulator.note_parameter()


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for accumulator in _held_by(optimizer):
        if accumulator.rows:
            accumulator.clear()
            raise TractError(
                f"the optimizer's step ran the backward of {accumulator.weight_name!r} itself, as "
                "a closure does, and used the ordinary gradient: call tract_hub.finish(model) "
                "after that backward (in Lightning, in on_before_optimizer_step), or pass "
                "scope='local'"
            )


def _held_by(optimizer: Optimizer) -> list[Accumulator]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [accumulator for accumulator in _live if id(accumulator.parameter) in held]


def _is_of_deepspeed(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO keeps the gradient of a parameter: by stages 1 and 2, or by 3."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _remove_idle_hooks() -> None:
    # Not from within a step: torch goes through its table of hooks then.
    if next(iter(_live), None) is None:
        while _hooks:
            _hooks.pop().remove()
