"""In the shape of run_image_classification.py: HfArgumentParser, a config on disk, the Trainer."""

from dataclasses import dataclass, field

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class ModelArguments:
    config_name: str = field(metadata={"help": "Folder with a config.json."})
    out: str = field(metadata={"help": "File for the weights."})


def main():
    model_args, training_args = HfArgumentParser(
        (ModelArguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    config = AutoConfig.from_pretrained(model_args.config_name)
    model = AutoModelForImageClassification.from_config(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(4, 3, config.image_size, config.image_size)
    examples = [{"pixel_values": image, "labels": i} for i, image in enumerate(images)]
    Trainer(model=model, args=training_args, train_dataset=examples).train()
    torch.save({"before": before, "after": model.state_dict(), "images": images}, model_args.out)


if __name__ == "__main__":
    main()
