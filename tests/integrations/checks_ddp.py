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
    calls_of_all_reduce,
    check,
    ddp,
    errors,
    gradients,
    loss_of,
    message_of,
    mine,
    step_errors,
)


@check
def scope_rank() -> Any:
    """Each process uses the rows of its own batch, whatever was done first; nothing is summed."""
    models = [ddp(build("rank")), tract_hub.enable(ddp(tract_hub.disable(build())), stems=["stem"])]
    alone = [build("rank") for _ in range(dist.get_world_size())]
    pairs = zip(*(t.chunk(len(alone)) for t in batch()), strict=True)
    for model, (images, labels) in zip(alone, pairs, strict=True):
        loss_of(model, images, labels).backward()
    each = [gradients(model) for model in alone]
    expected = {name: sum(share[name] for share in each) for name in each[0]}
    calls = [calls_of_all_reduce(lambda m=m: accumulate(m, 1, m.no_sync)) for m in models]
    return {"calls": sum(calls)}, [errors(gradients(model), expected) for model in models]


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
def ddp_clipped_norm() -> Any:
    model = ddp(build())
    accumulate(model, 2, model.no_sync)
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    alone = at_once()
    expected = torch.stack([gradient.norm() for gradient in alone.values()]).norm()
    clipped = {name: gradient * 0.1 / (expected + 1e-6) for name, gradient in alone.items()}
    return {"norm": abs(norm / float(expected) - 1), **errors(gradients(model), clipped)}


@check
def ddp_training() -> Any:
    """Five steps of two backwards, against one process that sees each batch at once."""
    model, single = ddp(build()), build("rank")
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, single)]
    for seed in range(5):
        pixels, labels = batch(seed=seed)
        for number, (images, targets) in enumerate(mine(pixels, labels, parts=2), 1):
            with model.no_sync() if number == 1 else contextlib.nullcontext():
                loss_of(model, images, targets, dist.get_world_size()).backward()
        loss_of(single, pixels, labels).backward()
        for optimizer in optimizers:
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
    return errors(gradients(model), at_once())


@check
def ddp_empty_share() -> Any:
    model = ddp(build())
    images, labels = batch()
    rank, world = dist.get_rank(), dist.get_world_size()
    start, end = (0, 0) if rank == 0 else (0, BATCH) if rank == 1 else (BATCH, BATCH)
    loss_of(model, images[start:end], labels[start:end], world).backward()
    return errors(gradients(model), at_once())


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
            torch.autograd.grad(kept.sum(), model.module.stem.weight)  # and no .grad
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
def ddp_backward_of_the_model_inside() -> Any:
    """A backward around the wrapper is not synchronised, and says so."""
    model = ddp(build())
    images, labels = batch()
    message = "no error"
    if dist.get_rank() == 0:
        message = message_of(lambda: loss_of(model.module, images, labels).backward())
    model.zero_grad()
    return message, step_errors(model, 1)


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
        found.append(errors(gradients(model), at_once()))
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
    return errors(gradients(model), at_once())


@check
def ddp_two_forwards_one_backward() -> Any:
    model = ddp(build())
    world = dist.get_world_size()
    losses = [loss_of(model, *part, world) for part in mine(*batch(), parts=2)]
    calls = calls_of_all_reduce(sum(losses).backward)
    return {"calls": calls - 1, **errors(gradients(model), at_once())}


@check
def ddp_several_stems_one_sum() -> Any:
    model = ddp(build(kind=TwoStems))
    calls = calls_of_all_reduce(lambda: accumulate(model, 2, model.no_sync))
    return {"calls": calls - 1, **errors(gradients(model), at_once(TwoStems))}


@check
def ddp_checkpointed() -> Any:
    model = ddp(build(kind=lambda: Net(repeat=False)))
    return step_errors(model, 2, model.no_sync)


@check
def ddp_checkpointed_reentrant() -> Any:
    model = ddp(build(kind=lambda: Net(repeat=True)))
    images, labels = batch()
    return message_of(lambda: loss_of(model, images.requires_grad_(), labels).backward())


@check
def ddp_join() -> Any:
    """The last process has a batch more than the others."""
    model = ddp(build())
    images, labels = batch()

    def train() -> None:
        with model.join():
            for _ in range(1 + (dist.get_rank() == dist.get_world_size() - 1)):
                loss_of(model, images, labels).backward()

    return message_of(train)


@check
def ddp_not_finite_in_one() -> Any:
    """All processes see it, and the step after it knows nothing of it."""
    model = ddp(build())
    images, labels = batch()
    bad = images * float("inf") if dist.get_rank() == 0 else images
    loss_of(model, bad, labels).backward()
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
def ddp_step_without_synchronising() -> Any:
    model = ddp(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    images, labels = batch()
    with model.no_sync():
        loss_of(model, images, labels).backward()
    message = message_of(optimizer.step)
    model.zero_grad()
    return message, step_errors(model, 2, model.no_sync)


@check
def ddp_step_after_an_unsynchronised_backward() -> Any:
    """DDP does not average a second backward through one forward."""
    model = ddp(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = loss_of(model, *batch())
    for _ in range(2):
        loss.backward(retain_graph=True)
    return message_of(optimizer.step)


@check
def no_wrapper() -> Any:
    model = build()
    images, labels = batch()
    return message_of(lambda: loss_of(model, images, labels).backward())


@check
def ddp_compiled_inside() -> Any:
    model = ddp(torch.compile(build(), backend="aot_eager"))
    return step_errors(model, 2, model.no_sync)


@check
def ddp_compiled_around() -> Any:
    model = torch.compile(ddp(build()), backend="aot_eager")
    return step_errors(model, 2, model.no_sync)


@check
def join_without_a_batch() -> Any:
    """The first process has joined before the first forward; a check of its own, as it ends."""
    model = ddp(build())
    with model.join():
        if dist.get_rank() > 0:
            try:
                loss_of(model, *batch()).backward()
            except tract_hub.TractError as error:
                raise SystemExit(str(error)) from error  # as a script ends that lets it through
