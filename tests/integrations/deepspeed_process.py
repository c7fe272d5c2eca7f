"""One process of ``test_deepspeed.py``: ``deepspeed_process.py STAGE WORLD``, by torchrun."""

from __future__ import annotations

import json
import sys

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

import tract_hub
from tests.integrations.processes import (
    BATCH,
    at_once,
    batch,
    build,
    errors,
    loss_of,
    message_of,
    mine,
)

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
    model = build("local" if stage == 3 else "global")
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    found, message = [], "no error"
    for finishes in (True, True, False):  # SGD with a rate of 1 moves each weight by its gradient
        before = weights(engine, stage)
        for number, (images, labels) in enumerate(mine(*batch(), parts=PARTS)):
            engine.backward(loss_of(engine, images, labels, world * PARTS))
            if finishes and number == PARTS - 1:
                tract_hub.finish(model)
            message = message_of(engine.step)
        if finishes and stage < 3:
            after = weights(engine, stage)
            moved = {name: before[name] - after[name] for name in before}
            found.append(errors(moved, at_once(weights=before)))
    if dist.get_rank() == 0:
        print(json.dumps({"steps": found, "message": message}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
