"""Lightning and fastai, where they are installed: one step is the closed form, clipped or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error

BATCH, LR, CLIP = 8, 0.1, 0.05
GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.randn(2 * BATCH, 1, 8, 8, generator=GENERATOR)
LABELS = torch.randint(10, (2 * BATCH,), generator=GENERATOR)
CASES = [
    ("local", 1, None),
    ("local", 2, CLIP),
    ("global", 1, None),
    ("global", 2, CLIP),
]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def loader() -> torch.utils.data.DataLoader:
    pairs = torch.utils.data.TensorDataset(IMAGES, LABELS)
    return torch.utils.data.DataLoader(pairs, batch_size=BATCH)


def expected(scope: str, batches: int, clip: float | None) -> Tensor:
    """The stem's gradient of one step over so many batches."""
    model, images = build(), IMAGES[: BATCH * batches]
    nn.functional.cross_entropy(model(images), LABELS[: len(images)]).backward()
    weight = model[0].weight
    if scope == "global":
        corrected = closed_form(weight.grad, layer_rows(model[0], images), 0.1)
    else:
        corrected = torch.zeros_like(weight)
        for part, labels in zip(images.split(BATCH), LABELS.split(BATCH), strict=False):
            loss = nn.functional.cross_entropy(model(part), labels) / batches
            (gradient,) = torch.autograd.grad(loss, weight)
            corrected += closed_form(gradient, layer_rows(model[0], part), 0.1)
    weight.grad = corrected.to(weight.dtype)
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    return weight.grad


@pytest.mark.parametrize(("scope", "batches", "clip"), CASES)
def test_lightning(scope: str, batches: int, clip: float | None) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = tract_hub.enable(build(), scope=scope)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            tract_hub.finish(self.net)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), LR)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=batches, gradient_clip_val=clip,
    )  # fmt: skip
    trainer.fit(module, loader())
    moved = (build()[0].weight - module.net[0].weight) / LR
    assert relative_error(moved.detach(), expected(scope, batches, clip)) < 2e-4  # of a difference


@pytest.mark.parametrize(("scope", "batches", "clip"), CASES)
def test_fastai(scope: str, batches: int, clip: float | None) -> None:
    pytest.importorskip("fastai", reason="fastai is not installed")
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.learner import Callback, DataLoaders, Learner
    from fastai.optimizer import SGD

    class FinishTract(Callback):
        order = GradientClip.order - 1

        def before_step(self) -> None:
            tract_hub.finish(self.model)

    gradients: list[Tensor] = []

    class Look(Callback):
        order = GradientClip.order + 1

        def before_step(self) -> None:
            gradients.append(self.model[0].weight.grad.clone())

    model = tract_hub.enable(build(), scope=scope)
    callbacks = [GradientAccumulation(BATCH * batches), FinishTract(), Look()]
    callbacks += [GradientClip(clip)] if clip else []
    loaders = DataLoaders(loader(), loader())
    learner = Learner(loaders, model, nn.CrossEntropyLoss(), opt_func=SGD, cbs=callbacks)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, LR)
    assert relative_error(gradients[0], expected(scope, batches, clip)) < 1e-5
