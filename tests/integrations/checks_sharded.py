"""Checks of ``scope="global"`` under FSDP2, FSDP1 and Accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import tract_hub
from tests.integrations.processes import (
    at_once,
    batch,
    build,
    check,
    errors,
    full,
    gradients,
    loss_of,
    message_of,
    mine,
    step_errors,
)


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model.body)
    return fully_shard(model)


@contextlib.contextmanager
def unsynchronised(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


@check
def fsdp2_one_backward() -> Any:
    model = sharded(build())
    return step_errors(model, 1)


@check
def fsdp2_accumulation() -> Any:
    model = sharded(build())
    return step_errors(model, 4, lambda: unsynchronised(model))


@check
def fsdp2_accumulation_synchronising_each() -> Any:
    model = sharded(build())
    return step_errors(model, 4)


@check
def fsdp2_training() -> Any:
    """Two steps, one that is skipped, and a third: the clipped norm and the gradients of it."""
    model = sharded(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for bad in (False, False, True):
        images, labels = batch()
        if bad and dist.get_rank() == 0:
            images = images * float("inf")
        loss_of(model, images, labels).backward()
        if bad:
            tract_hub.finish(model)  # sharded gradients do not show that they were thrown away
        else:
            optimizer.step()
        optimizer.zero_grad()
    found = step_errors(model, 2, lambda: unsynchronised(model))
    norm = full(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    expected = torch.stack([gradient.norm() for gradient in at_once().values()]).norm()
    return {"norm": abs(float(norm / expected) - 1), **found}


@check
def fsdp2_two_dimensions() -> Any:
    """Shards in pairs, copies of them among pairs."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("r", "s"))
    model = fully_shard(build(), mesh=mesh)
    return step_errors(model, 2, lambda: unsynchronised(model))


@check
def fsdp1_local() -> Any:
    """Under FSDP1, the scope "local" works, and "global" is refused."""
    wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
    message = message_of(lambda: loss_of(wrap(build()), *batch()))
    model, (images, labels) = wrap(build("local")), batch()
    loss_of(model, images, labels).backward()
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return message, errors(gradients(model), at_once())


@check
def accelerate_ddp() -> Any:
    return of_accelerate()


@check
def accelerate_fsdp2() -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    return of_accelerate(FullyShardedDataParallelPlugin(fsdp_version=2))


def of_accelerate(fsdp_plugin: Any = None) -> Any:
    """Two steps of two backwards; their clipped norms, and the gradients of the second."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if fsdp_plugin is not None:  # Accelerate takes no plugin on a CPU, and can do what it asks for
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = fsdp_plugin
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0))
    expected, found = at_once(), {}
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for number, (images, labels) in enumerate([*mine(*batch(), parts=2)] * 2):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, images, labels, 2 * dist.get_world_size()))
            if accelerator.sync_gradients:
                tract_hub.finish(model)
                found |= errors(gradients(model), expected)
                clipped = accelerator.clip_grad_norm_(model.parameters(), 0.1)
                found[f"norm {number}"] = abs(float(full(clipped) / norm) - 1)
            optimizer.step()
            optimizer.zero_grad()
    return [cls.__name__ for cls in type(model).__mro__], found
