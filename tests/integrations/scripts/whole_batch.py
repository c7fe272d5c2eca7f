"""A DDP script whose processes share one fixed batch; in one process it has all of it."""

import sys
import time

import torch
import torch.distributed as dist
from torch import nn


def main():
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).double()
    images, labels = torch.randn(8, 3, 8, 8).double(), torch.arange(8) % 2
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        logits = wrapped(images.chunk(world)[rank])
        nn.functional.cross_entropy(logits, labels.chunk(world)[rank]).backward()
        optimizer.step()
    if rank == 0:
        torch.save(model.state_dict(), sys.argv[1])
    dist.barrier()


dist.init_process_group("gloo")
main()  # its model and graph are gone before the process group is
dist.destroy_process_group()
time.sleep(0.5)  # for Gloo's threads, see torchvision_loop.py
