"""One run: an arm and a seed, from fresh weights to its last epoch."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tract_hub
from tract_hub.studies.compare.optim import make_optimizer, make_schedule
from tract_hub.studies.compare.progress import Progress
from tract_hub.studies.compare.records import Arm, EpochRecord, RunRecord
from tract_hub.studies.compare.snapshots import Snapshots
from tract_hub.studies.compare.study import Study
from tract_hub.studies.files import write_atomically
from tract_hub.studies.images.prepared import test_loader, train_loader
from tract_hub.studies.models.plan import logits_of

DIGEST_BASE = 1_000_003


def fresh_model(study: Study, arm: Arm, seed: int) -> nn.Module:
    """Return the model that a run starts from; equal seeds give bit-identical weights.

    Args:
        study: makes the model.
        arm: TrAct is enabled when it has a λ.
        seed: of the weights.

    """
    from accelerate.utils import set_seed

    set_seed(seed)
    model = study.plan.build().to(memory_format=study.memory_format)
    if arm.lam is not None:
        tract_hub.enable(model, lam=arm.lam, example_inputs=study.plan.example())
    # Whatever enabling may have drawn, dropout begins alike in every arm.
    set_seed(seed)
    return model


def train_run(
    study: Study, arm: Arm, seed: int, progress: Progress, keep: Path | None = None
) -> RunRecord:
    """Train one arm from one seed and return its numbers.

    Args:
        study: what all runs share.
        arm: ordinary, or TrAct.
        seed: of weights, batches, augmentation and dropout.
        progress: is told of every step.
        keep: where to write the weights in the end, as safetensors.

    """
    run = _Run(study, arm, seed)
    snapshots = Snapshots(study.stems[0].weight_name, run.stem_weight, study.settings.epochs)
    epochs: list[EpochRecord] = []
    for epoch in range(1, study.settings.epochs + 1):
        record = run.epoch(epoch, progress)
        epochs.append(record)
        progress.epoch_ended(record)
        snapshots.after(epoch, last=not record.finite())
        if not record.finite():
            break
    if keep is not None:
        run.save(keep)
    diverged_at = None if epochs[-1].finite() else epochs[-1].epoch
    return RunRecord(
        arm=arm,
        seed=seed,
        epochs=tuple(epochs),
        diverged_at=diverged_at,
        start=run.start,
        batches=run.batches(),
        filters=snapshots.filters(),
    )


class _Run:
    """The moving parts of one run."""

    def __init__(self, study: Study, arm: Arm, seed: int) -> None:
        settings, accelerator = study.settings, study.accelerator
        self.study = study
        model = fresh_model(study, arm, seed)
        self.start = state_digest(model)
        loader = train_loader(
            study.data, settings.augment, settings.batch_size, seed, settings.workers
        )
        tests = test_loader(study.data, settings.batch_size, settings.workers)
        optimizer = make_optimizer(model, settings, study.stems)
        schedule = make_schedule(optimizer, settings, len(loader))
        prepared = accelerator.prepare(model, optimizer, schedule, loader, tests)
        self.model, self.optimizer, self.schedule, self.loader, self.tests = prepared
        self.seen = torch.zeros((), dtype=torch.int64, device=accelerator.device)

    def epoch(self, number: int, progress: Progress) -> EpochRecord:
        began = time.perf_counter()
        train_loss = self._train(progress)
        seconds = time.perf_counter() - began
        test_loss, accuracy = self._test()
        return EpochRecord(number, train_loss, test_loss, accuracy, seconds)

    def _train(self, progress: Progress) -> float:
        self.model.train()
        accelerator = self.study.accelerator
        total = torch.zeros((), device=accelerator.device)
        for images, labels in self.loader:
            self.seen = extend_digest(self.seen, images, labels)
            total += self._step(self.study.normalised(images), labels)
            progress.step_ended()
        mean: float = accelerator.reduce(total / len(self.loader), reduction="mean").item()
        return mean

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.study.accelerator.autocast():
            logits = logits_of(self.model(images))
        smoothing = self.study.settings.label_smoothing
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        self.study.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        self.model.eval()
        losses, hits = [], []
        for images, labels in self.tests:
            logits = logits_of(self.model(self.study.normalised(images))).float()
            loss = F.cross_entropy(logits, labels, reduction="none")
            hit = logits.argmax(1) == labels
            loss, hit = self.study.accelerator.gather_for_metrics((loss, hit))
            losses.append(loss)
            hits.append(hit)
        loss_mean: float = torch.cat(losses).mean().item()
        accuracy: float = torch.cat(hits).double().mean().item()
        return loss_mean, accuracy

    def batches(self) -> str:
        """Return the digest of what all processes saw."""
        seen = self.study.accelerator.gather(self.seen.reshape(1))
        return hashlib.sha256(seen.cpu().numpy().tobytes()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the weights and buffers as those of the ordinary model."""
        model = self.study.accelerator.unwrap_model(self.model)
        if self.study.accelerator.is_main_process:
            weights = {name: value.cpu() for name, value in model.state_dict().items()}
            write_atomically(path, safetensors.torch.save(weights))

    def stem_weight(self) -> Tensor:
        model = self.study.accelerator.unwrap_model(self.model)
        weight: Tensor = model.get_parameter(self.study.stems[0].weight_name)
        return weight


def state_digest(model: nn.Module) -> str:
    """Return a digest of all parameters and buffers, names and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def extend_digest(seen: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Return a digest that goes on from ``seen``; it depends on the order of batches and rows.

    It stays on the device, so training does not wait for it.

    Args:
        seen: int64 scalar.
        images: uint8, batch × channels × height × width.
        labels: int64, batch.

    """
    places = torch.arange(1, len(labels) + 1, device=labels.device)
    pixels = images.flatten(1).sum(1, dtype=torch.int64)
    return seen * DIGEST_BASE + ((pixels * DIGEST_BASE + labels + 1) * places).sum()
