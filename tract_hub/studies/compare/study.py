"""What all runs of a comparison share, checked before any of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tract_hub
from tract_hub.stem import Stem
from tract_hub.studies.compare.devices import make_accelerator
from tract_hub.studies.compare.optim import check_optimizer
from tract_hub.studies.compare.records import ORDINARY, Arm
from tract_hub.studies.images.prepared import Prepared, prepare, train_loader
from tract_hub.studies.images.sources import load_source
from tract_hub.studies.models.plan import ModelPlan, plan_model
from tract_hub.studies.settings import CompareSettings


@dataclass(frozen=True)
class Study:
    """What all runs of a comparison share.

    Args:
        settings: all choices.
        data: fitted to the model.
        plan: makes the model.
        stems: its first layers, of a model of its own; the filters of the first are kept.
        accelerator: an ``accelerate.Accelerator``.

    """

    settings: CompareSettings
    data: Prepared
    plan: ModelPlan
    stems: tuple[Stem, ...]
    accelerator: Any

    @property
    def arms(self) -> list[Arm]:
        """The ordinary arm, and one for every λ there is."""
        return [ORDINARY, *(Arm(lam) for lam in self.settings.lams)]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self.data.train) // self.settings.batch_size

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the model and its images."""
        last = self.settings.channels_last
        return torch.channels_last if last else torch.contiguous_format

    def normalised(self, images: Tensor) -> Tensor:
        """Return a uint8 batch as what the model is called with, on the same device."""
        values: Tensor = self.data.normaliser(self.settings.normalise)(images)
        return values.contiguous(memory_format=self.memory_format)


def make_study(settings: CompareSettings) -> Study:
    """Check everything that can be checked before any training.

    Args:
        settings: all choices.

    Raises:
        TractError: the model, the data or a setting cannot be used.

    """
    check_optimizer(settings)
    source = load_source(
        settings.data,
        settings.channels,
        settings.max_train,
        settings.max_test,
        settings.classes,
    )
    plan = plan_model(settings, source)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    accelerator = make_accelerator(settings.device, settings.precision, settings.batch_size)
    data = prepare(source, plan.size).to(accelerator.device)
    train_loader(data, settings.augment, settings.batch_size, 0, settings.workers)
    stems = tract_hub.locate(plan.build(), example_inputs=plan.example())
    return Study(settings, data, plan, stems, accelerator)
