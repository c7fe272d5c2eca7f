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
STEM = zoo.ALL["ViT"].weights[0]
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


def dataset(batches: int = 6) -> list[dict[str, Tensor]]:
    """The same as a list, which a Trainer shuffles."""
    pairs = [pair for i in range(batches) for pair in zip(*batch(i), strict=True)]
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }
    return TrainingArguments(**{**defaults, **options})


def trainer(model: nn.Module, args: TrainingArguments, **options: Any) -> Trainer:
    return Trainer(**{"model": model, "args": args, "train_dataset": Stream(), **options})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(
    model: nn.Module,
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    stem: str = STEM,
    lam: float | None = 0.1,
    accumulate: int = 1,
    clip: float = 0.0,
    smoothing: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Weights of an ordinary model after a loop that applies the closed form to its gradient.

    Args:
        make: makes the optimizer from the groups with and without weight decay.
        lam: None for ordinary training.

    """
    decayed = Trainer.get_decay_parameter_names(None, model)
    decay = {"params": [p for n, p in model.named_parameters() if n in decayed]}
    rest = [p for n, p in model.named_parameters() if n not in decayed]
    optimizer = make([decay, {"params": rest, "weight_decay": 0.0}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    layer = model.get_submodule(stem.removesuffix(".weight"))
    for step in range(STEPS):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for micro in range(accumulate):
            images, labels = batch(step * accumulate + micro)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = model(pixel_values=images).logits.float()
            loss = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
            gradients = torch.autograd.grad(loss / accumulate, list(model.parameters()))
            for (name, _), into, gradient in zip(
                model.named_parameters(), total, gradients, strict=True
            ):
                if name == stem and lam is not None:
                    gradient = closed_form(gradient, layer_rows(layer, images), lam)
                into += gradient
        for parameter, gradient in zip(model.parameters(), total, strict=True):
            parameter.grad = gradient
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return weights(model)
