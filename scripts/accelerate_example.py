"""A plain loop by Accelerate with TrAct: `accelerate launch scripts/accelerate_example.py`.

Copy it: what TrAct adds are the two lines with `tract_hub`.
"""

from __future__ import annotations

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits

import tract_hub

EPOCHS, BATCH, LR = 5, 64, 0.05


def main() -> None:
    accelerator = Accelerator()
    set_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    data = torch.utils.data.TensorDataset(images, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1397, 400])

    model = timm.create_model("resnet18", in_chans=1, num_classes=10)
    tract_hub.enable(model)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    loader = torch.utils.data.DataLoader(train, BATCH, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    test_loader = torch.utils.data.DataLoader(test, BATCH)
    model, optimizer, loader, test_loader, schedule = accelerator.prepare(
        model, optimizer, loader, test_loader, schedule
    )

    for epoch in range(EPOCHS):
        model.train()
        for pixels, labels in loader:
            loss = torch.nn.functional.cross_entropy(model(pixels), labels)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        right = []
        with torch.no_grad():
            for pixels, labels in test_loader:
                right.append(accelerator.gather_for_metrics(model(pixels).argmax(1) == labels))
        accelerator.print(f"epoch {epoch + 1}: {torch.cat(right).float().mean():.1%}")


if __name__ == "__main__":
    main()
