"""Trainers of small models on images in memory, and the same training in a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from tests import zoo
from tests.oracle import closed_form, layer_rows

BATCH, STEPS, LR = 4, 4, 1e-2
# Not a ViT: Transformers 5 does not load all of its keys back when a Trainer resumes.
NAME = "ConvNext"
STEM = zoo.ALL[NAME].weights[0]
LAYER = STEM.removesuffix(".weight")


def batch(index: int) -> tuple[Tensor, Tensor]:
    """Images of one micro-batch, (4, 3, 32, 32), and labels."""
    generator = torch.Generator().manual_seed(index)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator) * (1 + index % 3)
    return images, torch.randint(0, zoo.CLASSES, (BATCH,), generator=generator)


class Stream(IterableDataset):
    """The batches one after the other, without end: no Trainer shuffles it."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        index = 0
        while True:
            for image, label in zip(*batch(index), strict=True):
                yield {"pixel_values": image, "labels": label}
            index += 1


def dataset(batches: int) -> list[dict[str, Tensor]]:
    """The first batches as a list, which a Trainer shuffles."""
    pairs = [pair for index in range(batches) for pair in zip(*batch(index), strict=True)]
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LR,
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 2,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **options})


def trainer(model: nn.Module | None, args: TrainingArguments, **options: Any) -> Trainer:
    return Trainer(**{"model": model, "args": args, "train_dataset": Stream(), **options})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    lam: float | None = 0.1,
    accumulate: int = 1,
    clip: float = 0.0,
    together: bool = False,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train an ordinary model in a loop that applies the closed form to its gradient.

    Args:
        make: makes the optimizer from the groups with and without weight decay.
        lam: None for ordinary training.
        accumulate: micro-batches of a step.
        clip: norm to clip by.
        together: one Gram matrix for all micro-batches of a step.

    Returns:
        The weights, and the norm of all gradients of each step before it is clipped.

    """
    model = zoo.build(NAME)
    decayed = Trainer.get_decay_parameter_names(None, model)
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) is is_decayed]}
        for is_decayed in (True, False)
    ]
    groups[1]["weight_decay"] = 0.0
    optimizer = make(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    layer, weight = model.get_submodule(LAYER), model.get_parameter(STEM)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        every_image, corrected = [], torch.zeros_like(weight)
        for micro in range(accumulate):
            images, labels = batch(step * accumulate + micro)
            before = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
            loss = model(pixel_values=images, labels=labels).loss / accumulate
            loss.backward()
            every_image.append(images)
            if lam is not None:
                corrected += closed_form(weight.grad - before, layer_rows(layer, images), lam)
        if lam is not None:
            rows = layer_rows(layer, torch.cat(every_image))
            whole = closed_form(weight.grad, rows, lam).to(weight.dtype)
            weight.grad = whole if together else corrected
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return weights(model), norms
