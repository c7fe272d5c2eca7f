"""What the checks of ``run_checks.py`` share: a model, a batch, and how to compare gradients."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tract_hub

BATCH, CLASSES, SIDE, PATCH = 16, 5, 24, 6
STEM = "stem.weight"
WRAPPERS = re.compile(r"(module|_fsdp_wrapped_module|_orig_mod)\.")
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
        WRAPPERS.sub("", name): full(p.grad)
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
    model = build("local", kind)
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


def step_errors(
    model: nn.Module, parts: int, quiet: Callable[[], Any] = contextlib.nullcontext
) -> dict[str, float]:
    """Take one step, and compare its gradients with those of one process."""
    accumulate(model, parts, quiet)
    return finished_errors(model)


def finished_errors(model: nn.Module, kind: Callable[[], nn.Module] = Net) -> dict[str, float]:
    """Complete the gradients of a step, and compare them with those of one process."""
    tract_hub.finish(model)
    return errors(gradients(model), at_once(kind))


def message_of(step: Callable[[], Any]) -> str:
    try:
        step()
    except tract_hub.TractError as error:
        return str(error)
    return "no error"
