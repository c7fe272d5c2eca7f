"""TrAct in the loops that people train with: one step changes the stem, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tract_hub
from tests import zoo
from tests.oracle import relative_error

STEM = zoo.ALL["ViT"].weights[0]
LR = 0.1


def labels(batch: int) -> Tensor:
    return torch.arange(batch) % zoo.CLASSES


def by_hand(enabled: bool, batch: int = 4) -> dict[str, Tensor]:
    """Weights after one step of SGD in a plain loop."""
    model = zoo.build("ViT")
    if enabled:
        tract_hub.enable(model)
    x = zoo.images("ViT", batch=batch)
    model(pixel_values=x, labels=labels(batch)).loss.backward()
    torch.optim.SGD(model.parameters(), LR).step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_accelerate(enabled: bool, batch: int = 4, after: bool = False) -> dict[str, Tensor]:
    from accelerate import Accelerator

    model = zoo.build("ViT")
    if enabled and not after:
        tract_hub.enable(model)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), LR))
    if enabled and after:
        tract_hub.enable(model)
    x = zoo.images("ViT", batch=batch)
    accelerator.backward(model(pixel_values=x, labels=labels(batch)).loss)
    optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_trainer(enabled: bool, folder: Path, batch: int = 4) -> dict[str, Tensor]:
    from transformers import Trainer, TrainingArguments

    model = zoo.build("ViT")
    if enabled:
        tract_hub.enable(model)
    x, y = zoo.images("ViT", batch=batch), labels(batch)
    examples = [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        weight_decay=0.0,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=examples).train()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("loop", ["accelerate", "accelerate, enabled after", "Trainer"])
def test_a_step_of_a_known_loop_is_the_step_of_a_plain_one(loop: str, tmp_path: Path) -> None:
    if loop == "Trainer":
        got, ordinary = by_trainer(True, tmp_path), by_trainer(False, tmp_path)
    else:
        got, ordinary = by_accelerate(True, after="after" in loop), by_accelerate(False)
    for name, weight in by_hand(True).items():
        assert relative_error(got[name], weight) < 1e-6, name
    changed = [name for name in got if relative_error(got[name], ordinary[name]) > 1e-6]
    assert changed == [STEM]
