"""In the shape of run_image_classification_no_trainer.py: everything through prepare()."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForImageClassification


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--config", required=True)
    parser.add_argument("--lr", type=float, default=0.1)
    args = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    config = AutoConfig.from_pretrained(args.config)
    model = AutoModelForImageClassification.from_config(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(4, 3, config.image_size, config.image_size)
    twice = torch.cat([images, images])
    loader = DataLoader(TensorDataset(twice, torch.arange(4).repeat(2)), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for pixels, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(pixel_values=pixels, labels=labels).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1e6)
            optimizer.step()
            optimizer.zero_grad()
    after = accelerator.unwrap_model(model).state_dict()
    torch.save({"before": before, "after": after, "images": images}, args.out)


if __name__ == "__main__":
    main()
