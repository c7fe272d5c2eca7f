"""In the shape of torchvision's train.py: its models, and DDP, or FSDP2, under a launcher."""

import argparse
import os
import time

import torch
import torch.distributed as dist
import torchvision
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--model", default="squeezenet1_0")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0, help="of the images, plus the rank")
    parser.add_argument("--shard", action="store_true")
    args = parser.parse_args()
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, weights=None, num_classes=4, dropout=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = model
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        wrap = torch.nn.parallel.DistributedDataParallel
        trained = fully_shard(model, mesh=mesh) if args.shard else wrap(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=args.lr)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(args.seed + rank))
    trained.train()
    torch.nn.functional.cross_entropy(trained(images), torch.arange(4)).backward()
    optimizer.step()
    after = {n: p.full_tensor() if args.shard else p for n, p in model.state_dict().items()}
    if rank == 0:
        torch.save({"before": before, "after": after, "images": images}, args.out)
    if dist.is_initialized():
        dist.destroy_process_group()
        # A thread of Gloo's frees the tensors of full_tensor() when it gets to it, and aborts the
        # process if Python has ended by then; nothing in torch waits for it.
        time.sleep(0.5)


if __name__ == "__main__":
    main()
