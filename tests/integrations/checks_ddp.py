"""Checks of ``scope="global"`` under DistributedDataParallel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import tract_hub
from tests.integrations.processes import (
    BATCH,
    Net,
    TwoStems,
    accumulate,
    at_once,
    batch,
    build,
    check,
    ddp,
    errors,
    finished_errors,
    gradients,
    loss_of,
    message_of,
    mine,
    step_errors,
)


@check
def ddp_one_backward() -> Any:
    model = ddp(build())
    return step_errors(model, 1)


@check
def ddp_enabled_after_wrapping() -> Any:
    model = tract_hub.enable(ddp(tract_hub.disable(build())), stems=["stem"], scope="global")
    return step_errors(model, 2, model.no_sync)


@check
def ddp_accumulation() -> Any:
    model = ddp(build())
    return step_errors(model, 4, model.no_sync)


@check
def ddp_accumulation_synchronising_each() -> Any:
    model = ddp(build())
    return step_errors(model, 4)


@check
def ddp_training() -> Any:
    """Five steps of two backwards, against one process that sees each batch at once."""
    model, single = ddp(build()), build("local")
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, single)]
    for seed in range(5):
        pixels, labels = batch(seed=seed)
        for number, (images, targets) in enumerate(mine(pixels, labels, parts=2), 1):
            with model.no_sync() if number == 1 else contextlib.nullcontext():
                loss_of(model, images, targets, dist.get_world_size()).backward()
        loss_of(single, pixels, labels).backward()
        for optimizer in optimizers:  # nobody calls finish: the step does
            optimizer.step()
            optimizer.zero_grad()
    return errors(dict(model.module.named_parameters()), dict(single.named_parameters()))


@check
def ddp_unequal_shares() -> Any:
    """The first process has a single image, the last one all that is left."""
    model = ddp(build())
    images, labels = batch()
    rank, world = dist.get_rank(), dist.get_world_size()
    end = BATCH if rank == world - 1 else rank + 1
    loss_of(model, images[rank:end], labels[rank:end], world).backward()
    return finished_errors(model)


@check
def ddp_empty_share() -> Any:
    model = ddp(build())
    images, labels = batch()
    rank, world = dist.get_rank(), dist.get_world_size()
    start, end = (0, 0) if rank == 0 else (0, BATCH) if rank == 1 else (BATCH, BATCH)
    loss_of(model, images[start:end], labels[start:end], world).backward()
    return finished_errors(model)


@check
def ddp_uneven_forwards() -> Any:
    """The first process runs forwards that no other runs, and that no backward follows."""
    model = ddp(build())
    images, _ = batch()
    found = []
    for parts in (2, 1):  # DDP itself cannot go from such a forward to one under no_sync()
        if dist.get_rank() == 0:
            with model.no_sync() if parts > 1 else contextlib.nullcontext():
                model(images)  # its graph is dropped
                kept = model(images)
            with torch.no_grad():
                model(images)
            del kept
        found.append(step_errors(model, parts, model.no_sync))
        model.zero_grad()
    return found


@check
def ddp_evaluation_by_one() -> Any:
    """The first process evaluates alone, in the middle of a step."""
    model = ddp(build())

    @contextlib.contextmanager
    def evaluating() -> Iterator[None]:
        with model.no_sync():
            yield
        if dist.get_rank() == 0:
            model.eval()
            with torch.no_grad():
                model(batch()[0])
            model.train()

    return step_errors(model, 2, evaluating)


@check
def ddp_stem_unused_by_one() -> Any:
    """The first process has no pixels, in its very first step and in a later one."""
    model = ddp(build(), find_unused_parameters=True)
    images, labels = batch()
    world, found = dist.get_world_size(), []
    for _ in range(2):
        model.zero_grad()
        if dist.get_rank() == 0:
            features = torch.ones(4, 8, 2, 2)
            (model(None, features).sum() * 0).backward()
        else:
            part = slice(dist.get_rank() - 1, None, world - 1)
            loss_of(model, images[part], labels[part], world).backward()
        found.append(finished_errors(model))
    return found


@check
def ddp_loss_without_the_stem() -> Any:
    """The first process uses the stem, and then a loss that does not depend on it."""
    model = ddp(build(), find_unused_parameters=True)
    images, labels = batch()
    world = dist.get_world_size()
    if dist.get_rank() == 0:
        with torch.no_grad():
            features = model.module.stem(images)
        (model(None, features).sum() * 0).backward()
    else:
        part = slice(dist.get_rank() - 1, None, world - 1)
        loss_of(model, images[part], labels[part], world).backward()
    return finished_errors(model)


@check
def ddp_checkpointed() -> Any:
    model = ddp(build(kind=lambda: Net(repeat=False)))
    return step_errors(model, 2, model.no_sync)


@check
def ddp_not_finite_in_one() -> Any:
    """All processes see it, and the step after it knows nothing of it."""
    model = ddp(build())
    images, labels = batch()
    bad = images * float("inf") if dist.get_rank() == 0 else images
    loss_of(model, bad, labels).backward()
    tract_hub.finish(model)
    infected = not bool(model.module.stem.weight.grad.isfinite().any())
    model.zero_grad()  # as after a step that GradScaler skips
    return infected, step_errors(model, 2, model.no_sync)


@check
def ddp_skipped_step_zeroed_in_place() -> Any:
    model = ddp(build())
    images, labels = batch()
    bad = images * float("inf") if dist.get_rank() == 0 else images
    loss_of(model, bad, labels).backward()
    model.zero_grad(set_to_none=False)
    return step_errors(model, 2, model.no_sync)


@check
def ddp_compiled_inside() -> Any:
    model = ddp(torch.compile(build(), backend="aot_eager"))
    return step_errors(model, 2, model.no_sync)


@check
def ddp_compiled_around() -> Any:
    model = torch.compile(ddp(build()), backend="aot_eager")
    return step_errors(model, 2, model.no_sync)


@check
def ddp_local() -> Any:
    """With the scope "local", each process uses the rows of its own batch; nothing is summed."""
    models = [
        ddp(build("local")),
        tract_hub.enable(ddp(tract_hub.disable(build())), stems=["stem"]),
    ]
    alone = [build("local") for _ in range(dist.get_world_size())]
    pairs = zip(*(t.chunk(len(alone)) for t in batch()), strict=True)
    for model, (images, labels) in zip(alone, pairs, strict=True):
        loss_of(model, images, labels).backward()
    each = [gradients(model) for model in alone]
    expected = {name: sum(share[name] for share in each) for name in each[0]}
    for model in models:
        accumulate(model, 1, model.no_sync)
        tract_hub.finish(model)  # does nothing
    return [errors(gradients(model), expected) for model in models]


@check
def ddp_clipped_norm() -> Any:
    model = ddp(build())
    accumulate(model, 2, model.no_sync)
    tract_hub.finish(model)
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    alone = at_once()
    expected = torch.stack([gradient.norm() for gradient in alone.values()]).norm()
    clipped = {name: gradient * 0.1 / (expected + 1e-6) for name, gradient in alone.items()}
    return {"norm": abs(norm / float(expected) - 1), **errors(gradients(model), clipped)}


@check
def ddp_two_forwards_one_backward() -> Any:
    model = ddp(build())
    sum(loss_of(model, *part, dist.get_world_size()) for part in mine(*batch(), parts=2)).backward()
    return finished_errors(model)


@check
def ddp_several_stems() -> Any:
    model = ddp(build(kind=TwoStems))
    accumulate(model, 2, model.no_sync)
    return finished_errors(model, TwoStems)


@check
def ddp_checkpointed_reentrant() -> Any:
    model = ddp(build(kind=lambda: Net(repeat=True)))
    world = dist.get_world_size()
    for images, labels in mine(*batch()):
        loss_of(model, images.requires_grad_(), labels, world).backward()
    return finished_errors(model)


@check
def ddp_grad_scaler() -> Any:
    """The scaled gradients of a step that is skipped leave nothing to the next one."""
    model, found = ddp(build()), []
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    world = dist.get_world_size()
    for factor in (1.0, float("inf"), 1.0):
        for images, labels in mine(*batch()):
            scaler.scale(loss_of(model, images, labels, world) * factor).backward()
        scaler.unscale_(optimizer)
        if factor == 1.0:
            found.append(finished_errors(model))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return found


@check
def ddp_closure() -> Any:
    """A step whose closure runs the backward is refused, unless the closure ends with finish."""
    model = ddp(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def closure() -> None:
        accumulate(model, 1, model.no_sync)

    def finishing() -> None:
        model.zero_grad()
        closure()
        tract_hub.finish(model)

    message = message_of(lambda: optimizer.step(closure))
    optimizer.step(finishing)
    return message, errors(gradients(model), at_once())
