"""Train a Hugging Face model with TrAct on scikit-learn's handwritten digits, by the Trainer.

    python examples/hf_trainer.py

One argument of the Trainer is TrAct's. ``tract_hub.enable(model)`` before the Trainer would do as
well; the callback adds λ and the first layer's gradient norm to the logs, and λ to checkpoints.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import tract_hub

SIZES = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}


def digits() -> list[dict[str, torch.Tensor]]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()  # λ = 0.1 is meant for standardised pixels
    pairs = zip(images, torch.tensor(data.target), strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main() -> None:
    set_seed(0)
    examples = digits()
    config = ResNetConfig(num_channels=1, num_labels=10, **SIZES)
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=4, per_device_train_batch_size=64,
        learning_rate=5e-3, weight_decay=0.05, logging_steps=23, eval_strategy="epoch",
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=ResNetForImageClassification(config),
        args=args,
        train_dataset=examples[:1400],
        eval_dataset=examples[1400:],
        compute_metrics=accuracy,
        callbacks=[tract_hub.TractCallback(lam=0.1)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
