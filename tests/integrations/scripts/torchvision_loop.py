"""In the shape of torchvision's train.py: models from torchvision, DDP where a launcher says so."""

import argparse
import os

import torch
import torch.distributed as dist
import torchvision


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--model", default="squeezenet1_0")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0, help="of the images, plus the rank")
    args = parser.parse_args()
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, weights=None, num_classes=4, dropout=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    trained = model
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        trained = torch.nn.parallel.DistributedDataParallel(model)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(args.seed + rank))
    trained.train()
    torch.nn.functional.cross_entropy(trained(images), torch.arange(4)).backward()
    optimizer.step()
    if rank == 0:
        torch.save({"before": before, "after": model.state_dict(), "images": images}, args.out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
