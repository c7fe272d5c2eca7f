"""One process of ``test_deepspeed.py``: ``deepspeed_process.py STAGE``, started by torchrun."""

from __future__ import annotations

import json
import sys

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor

from tests.integrations.processes import BATCH, at_once, batch, build, errors, loss_of, mine

PARTS = 2


def weights(engine: torch.nn.Module, stage: int) -> dict[str, Tensor]:
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=stage == 3):
        return {name: p.detach().clone() for name, p in named.items()}


def main() -> None:
    stage, world = int(sys.argv[1]), int(sys.argv[2])
    config = {
        "train_micro_batch_size_per_gpu": BATCH // PARTS // world,
        "gradient_accumulation_steps": PARTS,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin, gradient_accumulation_steps=PARTS)
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1.0))
    found = []
    for _ in range(2):  # SGD with a rate of 1 moves each weight by its gradient
        before = weights(model, stage)
        for images, labels in mine(*batch(), parts=PARTS):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, images, labels, world * PARTS))
                optimizer.step()
                optimizer.zero_grad()
        after = weights(model, stage)
        moved = {name: before[name] - after[name] for name in before}
        found.append(errors(moved, at_once(weights=before)))
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
