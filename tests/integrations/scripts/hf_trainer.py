"""In the shape of run_image_classification.py: a config, the Trainer."""

import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def main():
    out = Path(sys.argv[1])
    set_seed(0)
    config = ViTConfig(**SIZES, intermediate_size=16, image_size=16, patch_size=4, num_labels=4)
    model = ViTForImageClassification(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(4, 3, 16, 16)
    examples = [{"pixel_values": image, "labels": i} for i, image in enumerate(images)]
    options = {"lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.1}
    args = TrainingArguments(
        output_dir=str(out.parent), max_steps=1, max_grad_norm=0.0, use_cpu=True, report_to=[],
        per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=examples).train()
    torch.save({"before": before, "after": model.state_dict(), "images": images}, out)


if __name__ == "__main__":
    main()
