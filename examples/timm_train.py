"""Train a timm model with TrAct on scikit-learn's handwritten digits, in a plain loop.

    python examples/timm_train.py

Two lines are TrAct's. In timm's own train.py the first of them stands after create_model; without
touching that script, run it as ``python -m tract_hub.launch train.py …``.
"""

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import tract_hub

EPOCHS, BATCH = 4, 64


def digits() -> TensorDataset:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()  # λ = 0.1 is meant for standardised pixels
    return TensorDataset(images, torch.tensor(data.target))


def main() -> None:
    torch.manual_seed(0)
    train, test = random_split(digits(), [0.8, 0.2])
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    tract_hub.enable(model, lam=0.1)
    print(tract_hub.status(model))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.05)

    for epoch in range(EPOCHS):
        model.train()
        for images, labels in DataLoader(train, BATCH, shuffle=True):
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            figures = tract_hub.measure(model)  # for wandb.log or a SummaryWriter
            optimizer.step()
        model.eval()
        images, labels = next(iter(DataLoader(test, len(test))))
        with torch.no_grad():
            accuracy = (model(images).argmax(1) == labels).float().mean()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {accuracy:.1%}, {figures}")


if __name__ == "__main__":
    main()
