"""In the shape of run_image_classification_no_trainer.py: everything through prepare()."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def main():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    config = ViTConfig(**SIZES, intermediate_size=16, image_size=16, patch_size=4, num_labels=4)
    model = ViTForImageClassification(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(4, 3, 16, 16)
    twice = torch.cat([images, images])
    loader = DataLoader(TensorDataset(twice, torch.arange(4).repeat(2)), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for pixels, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(pixel_values=pixels, labels=labels).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1e6)
            optimizer.step()
            optimizer.zero_grad()
    after = accelerator.unwrap_model(model).state_dict()
    torch.save({"before": before, "after": after, "images": images}, sys.argv[1])


if __name__ == "__main__":
    main()
