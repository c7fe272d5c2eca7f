"""The time of a training step in every arm, measured side by side."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tract_hub.studies.compare.optim import make_optimizer
from tract_hub.studies.compare.records import Arm
from tract_hub.studies.compare.study import Study
from tract_hub.studies.compare.training import fresh_model
from tract_hub.studies.interleaved import Ratio, interleave, ratio
from tract_hub.studies.models.plan import logits_of

WARM_UPS = 3
LEAST_ROUNDS, MOST_ROUNDS = 6, 100
BUDGET_SECONDS = 8.0


def time_steps(study: Study) -> dict[str, Any]:
    """Measure forward, backward and optimizer step on a batch that is already on the device.

    The arms take turns step by step, and every second round in the reverse order, so that a
    change in the machine's load meets all arms alike.

    Args:
        study: what all runs share.

    Returns:
        ``arms``; ``seconds``, the median by arm; ``overhead``, by arm the median over rounds of
        its time divided by the ordinary arm's in the same round; ``overhead_quartiles``, the
        first and third quartile of these; ``rounds``, all times by arm.

    """
    arms = study.arms
    steppers = [_Stepper(study, arm) for arm in arms]
    for _ in range(WARM_UPS):
        slowest = sum(stepper.timed() for stepper in steppers)
    rounds = interleave([stepper.timed for stepper in steppers], _round_count(study, slowest))
    by_arm = {str(arm): [times[i] for times in rounds] for i, arm in enumerate(arms)}
    ordinary = by_arm[str(arms[0])]
    ratios = {arm: ratio(times, ordinary) for arm, times in by_arm.items()}
    study.accelerator.free_memory()
    return {
        "arms": [str(arm) for arm in arms],
        "seconds": {arm: Ratio.of(times).median for arm, times in by_arm.items()},
        "overhead": {arm: value.median for arm, value in ratios.items()},
        "overhead_quartiles": {arm: [value.first, value.third] for arm, value in ratios.items()},
        "rounds": {arm: [round(t, 6) for t in times] for arm, times in by_arm.items()},
    }


def _round_count(study: Study, seconds: float) -> int:
    """Return how many rounds fit in the budget, the same in all processes."""
    from accelerate.utils import broadcast

    count = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(BUDGET_SECONDS / seconds)))
    return int(broadcast(torch.tensor(count, device=study.accelerator.device)).item())


class _Stepper:
    """One arm's model, taking the same step again and again."""

    def __init__(self, study: Study, arm: Arm) -> None:
        self.accelerator = study.accelerator
        model = fresh_model(study, arm, study.settings.seeds[0])
        optimizer = make_optimizer(model, study.settings, study.stems)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model.train()
        self.images, self.labels = _batch(study)

    def timed(self) -> float:
        self._wait()
        began = time.perf_counter()
        with self.accelerator.autocast():
            logits = logits_of(self.model(self.images))
        self.accelerator.backward(F.cross_entropy(logits.float(), self.labels))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        kind = self.accelerator.device.type
        if kind != "cpu":
            getattr(torch, kind).synchronize()


def _batch(study: Study) -> tuple[Tensor, Tensor]:
    """Return this process's share of a batch, on its device."""
    count = max(1, study.settings.batch_size // study.accelerator.num_processes)
    images, labels = study.data.train.batch(list(range(count)))
    device = study.accelerator.device
    return study.normalised(images.to(device)), labels.to(device)
