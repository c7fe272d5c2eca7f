"""In the shape of timm's train.py: an early import, AMP, an EMA copy, accumulation, compile."""

import argparse
from contextlib import nullcontext

import torch
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("--model", default="test_vit")
parser.add_argument("--lr", type=float, default=1.0)
parser.add_argument("--amp", action="store_true")
parser.add_argument("--compile", action="store_true")
parser.add_argument("--grad-accum-steps", type=int, default=1)


def main():
    args = parser.parse_args()
    torch.manual_seed(0)
    model = create_model(args.model, num_classes=4)
    model.set_grad_checkpointing()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = create_optimizer_v2(model, opt="momentum", lr=args.lr, weight_decay=0.0)
    ema = ModelEmaV3(model, decay=0.9)
    trained = torch.compile(model, backend="aot_eager") if args.compile else model
    images, labels = torch.randn(4, 3, 160, 160), torch.arange(4)
    model.train()
    for _ in range(args.grad_accum_steps):
        with torch.autocast("cpu", torch.bfloat16) if args.amp else nullcontext():
            loss = torch.nn.functional.cross_entropy(trained(images), labels)
        (loss / args.grad_accum_steps).backward()
    optimizer.step()
    ema.update(model)
    after = model.state_dict()
    torch.save({"before": before, "after": after, "images": images}, args.out)


if __name__ == "__main__":
    main()
