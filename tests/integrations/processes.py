"""What the processes of ``test_distributed.py`` run: named checks, one after the other.

Each check runs in every process and returns numbers; what came out, or the error, goes to a file.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tract_hub

BATCH, CLASSES, SIDE, PATCH = 16, 5, 24, 6
STEM = "stem.weight"
CHECKS: dict[str, Callable[[], Any]] = {}


class Net(nn.Module):
    """A patch stem, a layer and a head; it can do without the pixels, or see them twice."""

    def __init__(self, repeat: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, PATCH, stride=PATCH)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)
        self.repeat = repeat  # use_reentrant of a checkpoint around the stem

    def forward(self, images: Tensor | None, features: Tensor | None = None) -> Tensor:
        if images is not None and self.repeat is None:
            features = self.stem(images)
        elif images is not None:
            features = checkpoint(self.stem, images, use_reentrant=self.repeat)
        tokens = features.flatten(2).mT.tanh()
        return self.head(self.body(tokens).relu().mean(1))


class TwoStems(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Net(), Net()

    def forward(self, images: Tensor) -> Tensor:
        return self.left(images) + self.right(images.flip(-1))


def build(scope: str = "global", kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    stems = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return tract_hub.enable(model, stems=stems, scope=scope)


def batch(size: int = BATCH, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Smooth images, whose Gram matrix has large and small eigenvalues, as that of photos has."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, SIDE, SIDE, generator=generator).cumsum(-1).cumsum(-2)
    return images / images.std(), torch.randint(CLASSES, (size,), generator=generator)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, share: float = 1.0) -> Tensor:
    """The mean over the batch; ``share`` is what part of the whole batch an average of it is."""
    return nn.functional.cross_entropy(model(images), labels, reduction="sum") * share / BATCH


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("module.", "").replace("_fsdp_wrapped_", ""): full(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def full(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def at_once(
    kind: Callable[[], nn.Module] = Net, weights: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The gradients of one process with the whole batch, by the ordinary scope."""
    model = build("rank", kind)
    model.load_state_dict(weights or model.state_dict())
    loss_of(model, *batch()).backward()
    return gradients(model)


def mine(*tensors: Tensor, parts: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """This process's share of a batch, in as many parts as it accumulates."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shares = [tensor.chunk(world)[rank].chunk(parts) for tensor in tensors]
    return zip(*shares, strict=True)


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS[function.__name__] = function
    return function


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {n: float(((got[n] - e).norm() / e.norm()).detach()) for n, e in expected.items()}


def ddp(model: nn.Module, **settings: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **settings)


def accumulate(model: nn.Module, parts: int, quiet: Callable[[], Any]) -> None:
    """One step: ``quiet`` makes the context of each backward but the last."""
    world = dist.get_world_size()
    micro = list(mine(*batch(), parts=parts))
    for number, (images, labels) in enumerate(micro, 1):
        with quiet() if number < parts else contextlib.nullcontext():
            loss_of(model, images, labels, world).backward()


def calls_of_all_reduce(step: Callable[[], Any]) -> int:
    """How often this process asks for a sum itself: DDP's own are not asked for in Python."""
    count, original = 0, dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    dist.all_reduce = counting
    try:
        step()
    finally:
        dist.all_reduce = original
    return count


def message_of(step: Callable[[], Any]) -> str:
    try:
        step()
    except tract_hub.TractError as error:
        return str(error)
    return "no error"


# Data parallel.


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
    accumulate(model, 1, contextlib.nullcontext)
    return errors(gradients(model), at_once())


@check
def ddp_enabled_after_wrapping() -> Any:
    model = tract_hub.enable(ddp(tract_hub.disable(build())), stems=["stem"], scope="global")
    accumulate(model, 2, model.no_sync)
    return errors(gradients(model), at_once())


@check
def ddp_accumulation() -> Any:
    model = ddp(build())
    accumulate(model, 4, model.no_sync)
    return errors(gradients(model), at_once())


@check
def ddp_accumulation_synchronising_each() -> Any:
    model = ddp(build())
    accumulate(model, 4, contextlib.nullcontext)
    return errors(gradients(model), at_once())


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
        accumulate(model, parts, model.no_sync)
        found.append(errors(gradients(model), at_once()))
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

    accumulate(model, 2, evaluating)
    return errors(gradients(model), at_once())


@check
def ddp_backward_of_the_model_inside() -> Any:
    """A backward around the wrapper is not synchronised, and says so."""
    model = ddp(build())
    images, labels = batch()
    message = "no error"
    if dist.get_rank() == 0:
        message = message_of(lambda: loss_of(model.module, images, labels).backward())
    model.zero_grad()
    accumulate(model, 1, contextlib.nullcontext)
    return message, errors(gradients(model), at_once())


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
    accumulate(model, 2, model.no_sync)
    return errors(gradients(model), at_once())


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
    accumulate(model, 2, model.no_sync)
    return infected, errors(gradients(model), at_once())


@check
def ddp_skipped_step_zeroed_in_place() -> Any:
    model = ddp(build())
    images, labels = batch()
    bad = images * float("inf") if dist.get_rank() == 0 else images
    loss_of(model, bad, labels).backward()
    model.zero_grad(set_to_none=False)
    accumulate(model, 2, model.no_sync)
    return errors(gradients(model), at_once())


@check
def ddp_step_without_synchronising() -> Any:
    model = ddp(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    images, labels = batch()
    with model.no_sync():
        loss_of(model, images, labels).backward()
    message = message_of(optimizer.step)
    model.zero_grad()
    accumulate(model, 2, model.no_sync)
    return message, errors(gradients(model), at_once())


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
    accumulate(model, 2, model.no_sync)
    return errors(gradients(model.module._orig_mod), at_once())


@check
def ddp_compiled_around() -> Any:
    model = torch.compile(ddp(build()), backend="aot_eager")
    accumulate(model, 2, model.no_sync)
    return errors(gradients(model._orig_mod), at_once())


# Sharded.


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
    accumulate(model, 1, contextlib.nullcontext)
    return errors(gradients(model), at_once())


@check
def fsdp2_accumulation() -> Any:
    model = sharded(build())
    accumulate(model, 4, lambda: unsynchronised(model))
    return errors(gradients(model), at_once())


@check
def fsdp2_accumulation_synchronising_each() -> Any:
    model = sharded(build())
    accumulate(model, 4, contextlib.nullcontext)
    return errors(gradients(model), at_once())


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
        if not bad:
            optimizer.step()
        optimizer.zero_grad()
    accumulate(model, 2, lambda: unsynchronised(model))
    found = errors(gradients(model), at_once())
    norm = full(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    expected = torch.stack([gradient.norm() for gradient in at_once().values()]).norm()
    return {"norm": abs(float(norm / expected) - 1), **found}


@check
def fsdp2_two_dimensions() -> Any:
    """Shards in pairs, copies of them among pairs."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("r", "s"))
    model = fully_shard(build(), mesh=mesh)
    accumulate(model, 2, lambda: unsynchronised(model))
    return errors(gradients(model), at_once())


@check
def fsdp1_accumulation() -> Any:
    return of_fsdp1(lambda model: model.no_sync)


@check
def fsdp1_accumulation_synchronising_each() -> Any:
    return of_fsdp1(lambda model: contextlib.nullcontext)


def of_fsdp1(quiet: Callable[[Any], Callable[[], Any]]) -> Any:
    inner = build()
    model = FullyShardedDataParallel(inner, use_orig_params=True, device_id=torch.device("cpu"))
    accumulate(model, 2, quiet(model))
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return errors(gradients(model), at_once())


# On their own: what they leave behind is no place for another check.


def join_without_a_batch() -> Any:
    """The first process has joined before the others' first forward, and only waits for them."""
    model = ddp(build())
    with model.join():
        if dist.get_rank() > 0:
            try:
                loss_of(model, *batch()).backward()
            except tract_hub.TractError as error:
                raise SystemExit(str(error)) from error  # as a script ends that lets it through


# Through Accelerate.


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
                found |= errors(gradients(model), expected)
                clipped = accelerator.clip_grad_norm_(model.parameters(), 0.1)
                found[f"norm {number}"] = abs(float(full(clipped) / norm) - 1)
            optimizer.step()
            optimizer.zero_grad()
    return [cls.__name__ for cls in type(model).__mro__], found


def run(rank: int, world: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    init = f"file://{Path(folder) / 'init'}"
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(number) for name, number in ranks.items()})
    limit = timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=limit)
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = globals()[name]()
        except Exception:
            results[name] = traceback.format_exc()
        torch.save(results, Path(folder) / f"rank{rank}.pt")
        print(rank, name, results[name], file=sys.stderr, flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """``python -m tests.integrations.processes WORLD FOLDER CHECK …``."""
    world, folder, *names = sys.argv[1:]
    torch.multiprocessing.spawn(run, (int(world), folder, names), nprocs=int(world))


if __name__ == "__main__":
    main()
