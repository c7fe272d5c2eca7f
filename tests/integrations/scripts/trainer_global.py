"""A Trainer whose processes share each batch, with the gradient of the whole batch, clipped."""

import os
import sys
from pathlib import Path

import torch

import tract_hub
from tests import zoo
from tests.integrations.trainers import NAME, arguments, dataset, trainer


def main():
    out, world = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    args = arguments(
        out.parent, per_device_train_batch_size=8 // world, max_grad_norm=0.3, logging_steps=1
    )
    callbacks = [tract_hub.TractCallback(scope="global")]
    run = trainer(zoo.build(NAME), args, callbacks=callbacks, train_dataset=dataset(8))
    run.train()
    if run.is_world_process_zero():
        logs = [logs for logs in run.state.log_history if "grad_norm" in logs]
        torch.save({"weights": run.model.state_dict(), "logs": logs}, out)


if __name__ == "__main__":
    main()
