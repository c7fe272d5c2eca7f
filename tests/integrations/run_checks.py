"""What the processes of ``test_distributed.py`` run: named checks, one after the other.

Each check runs in every process and returns numbers; what came out, or the error, goes to a file.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.integrations import checks_ddp, checks_sharded  # noqa: F401
from tests.integrations.processes import CHECKS  # where they registered


def run(rank: int, world: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    init = f"file://{Path(folder) / 'init'}"
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(number) for name, number in ranks.items()})
    limit = timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=limit)
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = CHECKS[name]()
        except Exception:
            results[name] = traceback.format_exc()
        torch.save(results, Path(folder) / f"rank{rank}.pt")
        print(rank, name, results[name], file=sys.stderr, flush=True)
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.5)  # for Gloo's threads, see scripts/torchvision_loop.py


def main() -> None:
    """``python -m tests.integrations.run_checks WORLD FOLDER CHECK …``."""
    world, folder, *names = sys.argv[1:]
    torch.multiprocessing.spawn(run, (int(world), folder, names), nprocs=int(world))


if __name__ == "__main__":
    main()
