"""The one training loop of the studies, by Accelerate; kill -9 loses at most one epoch."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import tract_hub
from tract_hub.errors import SettingsError
from tract_hub.names import did_you_mean
from tract_hub.studies import table
from tract_hub.studies.data import Batch, ImageData, loader
from tract_hub.studies.models import build_classifier, logits_of
from tract_hub.studies.settings import ORDINARY, Arm, Compare, Run

EPOCH_SEED = 1_000_003
"""A prime beyond any number of epochs, so that no two epochs of two seeds draw alike."""


def make_accelerator(device: str = "auto", precision: str = "fp32") -> Accelerator:
    """Return the Accelerator of this process, for the settings' device and precision."""
    if precision == "fp16" and (device == "cpu" or not torch.accelerator.is_available()):
        raise SettingsError("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if device != "auto":
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
            raise SettingsError(f"no device {device!r} here; there is {there}") from error
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )


class Step:
    """One training step: forward, backward and, with an optimizer, the update.

    Model and optimizer are prepared by the accelerator; ``before_update`` is called between
    backward and update.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any = None,
        label_smoothing: float = 0.0,
        before_update: Callable[[], None] | None = None,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.before_update = before_update

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on a batch; return the loss, detached."""
        (self.optimizer or self.model).zero_grad()
        loss: Tensor = self.loss(logits_of(self.model(images)).float(), labels)
        self.accelerator.backward(loss)
        if self.before_update is not None:
            self.before_update()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()


class Rescaled:
    """Gives TrAct's gradients of the first layers the norms of their ordinary gradients.

    With the global scope, a backward leaves the ordinary gradient, and ``finish`` corrects it.
    """

    def __init__(self, model: nn.Module) -> None:
        stem, *_ = tract_hub.status(model)
        self.model = tract_hub.enable(model, stem.lam, damping=stem.damping, scope="global")
        self.names = [stem.weight_name for stem in tract_hub.status(model)]

    def __call__(self) -> None:
        """Correct the gradients of the last backward, and scale them."""
        weights = [self.model.get_parameter(name) for name in self.names]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norms = [gradient.norm() for gradient in gradients]
        tract_hub.finish(self.model)
        for gradient, norm in zip(gradients, norms, strict=True):
            gradient.mul_(norm / gradient.norm().clamp_min(1e-30))


def make_optimizer(model: nn.Module, settings: Compare, lr: float, stem_lr: float) -> Any:
    """Return timm's optimizer of a name, biases and norms without weight decay.

    The peak learning rate of the first layers' weights is the others' times ``stem_lr``.
    """
    name, decay, known = settings.optimizer, settings.weight_decay or 0.0, list_optimizers()
    if name not in known:
        raise SettingsError(f"timm has no optimizer {name!r}; {did_you_mean(name, known)}")
    momentum = settings.momentum
    optimizer = create_optimizer_v2(model, name, lr=lr, weight_decay=decay, momentum=momentum)
    if stem_lr != 1:
        stems = {id(stem.module.get_parameter("weight")) for stem in tract_hub.locate(model)}
        for group in list(optimizer.param_groups):
            first = [p for p in group["params"] if id(p) in stems]
            if first:
                group["params"] = [p for p in group["params"] if id(p) not in stems]
                optimizer.add_param_group({**group, "params": first, "lr": lr * stem_lr})
    return optimizer


def learning_rate(settings: Compare, steps: int, epochs: int) -> Callable[[int], float]:
    """Return the share of the peak learning rate at a step, of so many."""
    warmup = round((settings.warmup or 0.0) * steps / epochs)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, steps - warmup)
        kinds = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return kinds[settings.schedule]

    return share


@dataclass(frozen=True)
class Experiment:
    """What all runs of a study share: complete settings, and data fitted to the image size."""

    study: str
    settings: Compare
    data: ImageData
    size: int
    accelerator: Accelerator

    @property
    def metric(self) -> str:
        """The column of the table that the study is about."""
        return "balanced_accuracy" if self.data.balanced else "accuracy"

    @property
    def form(self) -> torch.memory_format:
        """Memory format of images and model."""
        return torch.channels_last if self.settings.channels_last else torch.contiguous_format

    def model(self, seed: int, arm: Arm = ORDINARY) -> nn.Module:
        """Return a fresh model of an arm; all arms of a seed have the same weights."""
        set_seed(seed)
        model = build_classifier(self.settings, self.data, self.size)
        if arm.lam is not None:
            tract_hub.enable(model, arm.lam, damping=arm.damping)
        model = model.to(self.accelerator.device).to(memory_format=self.form)
        if self.settings.compiled:
            model.compile()
        return model

    def to_model(self, images: Tensor) -> Tensor:
        """Normalise a batch of uint8 images."""
        pixels: Tensor = self.data.normalise(self.settings.pixels)(images)
        return pixels.contiguous(memory_format=self.form)


class Training:
    """One run, an epoch at a time; each epoch's random draws depend on seed and epoch alone."""

    def __init__(self, experiment: Experiment, run: Run) -> None:
        settings, data, self.run = experiment.settings, experiment.data, run
        self.experiment, self.accelerator = experiment, experiment.accelerator
        batch, workers = settings.batch_size, settings.workers
        if batch > len(data.train):
            raise SettingsError(
                f"--batch-size {batch} is more than the {len(data.train)} training images; lower it"
            )
        model = experiment.model(run.seed, run.arm)
        rescaled = Rescaled(model) if run.arm.rescaled else None
        optimizer = make_optimizer(model, settings, run.lr, run.arm.stem_lr)
        augment, size = settings.augment == "crop-flip", experiment.size
        train = loader(data.train, size, batch, workers, train=True, augment=augment)
        test = loader(data.test, size, batch, workers, train=False, augment=False)
        # Prepared loaders are others; these are what they draw from.
        self.images: Any = train.dataset
        self.generator = train.generator
        self.model, self.optimizer, self.train, self.test = self.accelerator.prepare(
            model, optimizer, train, test
        )
        share = learning_rate(settings, len(self.train) * run.epochs, run.epochs)
        self.schedule = LambdaLR(self.optimizer.optimizer, share)
        self.step = Step(
            self.accelerator, self.model, self.optimizer, settings.label_smoothing or 0.0, rescaled
        )

    def epoch(self, number: int) -> float:
        """Train on all images once; return the mean loss. Epochs are numbered from 1."""
        seed = self.run.seed * EPOCH_SEED + number
        set_seed(seed % 2**32)
        self.generator.manual_seed(seed)
        self.images.draw(seed)
        self.model.train()
        total = torch.zeros((), device=self.accelerator.device)
        for images, labels in self.batches():
            total += self.step(images, labels)
            self.schedule.step()
        return float(self.accelerator.reduce(total, "mean")) / len(self.train)

    def batches(self) -> Iterator[Batch]:
        """Yield the normalised images of an epoch and their labels."""
        for images, labels in self.train:
            yield self.experiment.to_model(images), labels

    @torch.no_grad()
    def correct(self) -> npt.NDArray[np.bool_]:
        """Return which test images the model gets right, in the order of the data."""
        self.model.eval()
        found = []
        for images, labels in self.test:
            logits = logits_of(self.model(self.experiment.to_model(images)))
            right = (logits.argmax(1) == labels) & logits.isfinite().all(1)
            found.append(self.accelerator.gather_for_metrics(right).cpu())
        return torch.cat(found).numpy()

    def parts(self) -> dict[str, Any]:
        """Return what has a state that the run needs to go on."""
        scaler = getattr(self.accelerator, "scaler", None)
        model = self.accelerator.unwrap_model(self.model)
        parts = {"model": model, "optimizer": self.optimizer, "schedule": self.schedule}
        return parts | ({} if scaler is None else {"scaler": scaler})

    def load(self, path: Path) -> int:
        """Go on from a saved state; return the epoch that it was saved after."""
        saved = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        return int(saved["epoch"])

    def save(self, path: Path, epoch: int) -> None:
        """Save the state after an epoch; a reader sees the one before or this one, whole."""
        buffer = io.BytesIO()
        states = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({**states, "epoch": epoch}, buffer)
        table.write_atomically(path, buffer.getvalue())


def train(
    training: Training,
    folder: Path,
    after: Callable[[dict[str, Any]], bool | None],
    save_every: int = 1,
) -> bool:
    """Train a run, from where it was interrupted; append its rows; return whether it is done.

    ``after`` is called with each epoch's row, and returns whether to stop there, to go on another
    time. A run that is killed loses the epochs after the last that was saved.
    """
    experiment, run = training.experiment, training.run
    state, main = folder / "state" / f"{run.slug}.pt", experiment.accelerator.is_main_process
    done = training.load(state) if state.exists() else 0
    labels = experiment.data.test.labels.numpy()
    for epoch in range(done + 1, run.epochs + 1):
        began = time.perf_counter()
        loss = training.epoch(epoch)
        seconds = time.perf_counter() - began
        correct = training.correct()
        recalls = [correct[labels == label].mean() for label in np.unique(labels)]
        # A diverged run does not come back: its remaining epochs are as this one.
        last, stop = epoch if math.isfinite(loss) else run.epochs, False
        for each in range(epoch, last + 1):
            row = {
                "study": experiment.study,
                **dict(zip(table.RUN, run.key, strict=True)),
                "epoch": each,
                "loss": round(loss, 6) if math.isfinite(loss) else None,
                "accuracy": round(float(correct.mean()), 6),
                "balanced_accuracy": round(float(np.mean(recalls)), 6),
                "seconds": round(seconds, 4),
                "correct": table.pack(correct),
            }
            if main:
                table.append(folder / "runs.jsonl", row)
            stop = bool(after(row))
        done = last
        if main and done < run.epochs and (stop or done % save_every == 0):
            training.save(state, done)
        if stop or done == run.epochs:
            break
    if main and done == run.epochs:
        state.unlink(missing_ok=True)
    experiment.accelerator.free_memory()
    return done == run.epochs
