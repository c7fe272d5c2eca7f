"""What a script may do besides training one model; the first argument says which of it."""

import sys
import warnings

import torch
from torch import nn

import tract_hub


class Net(nn.Module):
    def __init__(self, stem=None):
        super().__init__()
        self.stem = stem or nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.stem(x).relu().mean((2, 3)))


class Generator(Net):
    def forward(self, x):
        return self.stem(x).sigmoid()


def train(model, x, steps=1, parameters=None):
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def one(x):
    train(Net(), x, steps=3)


def named(x):
    net = Net()
    train(net, x)


def evaluates_halfway(x):
    warnings.simplefilter("ignore")
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for training in (True, False):
        model.train(training)(x).square().mean().backward()
        optimizer.step()


def exits(x):
    train(Net(), x)
    sys.exit(7)


def exits_well(x):
    train(Net(), x)
    sys.exit()


def raises(x):
    train(Net(), x)
    raise RuntimeError("the disk is full")


def adversaries(x):
    generator, discriminator = Generator(nn.Conv2d(3, 3, 1)), Net()
    of_generator = torch.optim.Adam(generator.parameters())
    of_discriminator = torch.optim.Adam(discriminator.parameters())
    for _ in range(2):
        made = generator(torch.randn_like(x))
        (discriminator(made.detach()) - discriminator(x)).mean().backward()
        of_discriminator.step()
        discriminator(made).mean().backward()
        of_generator.step()


def folds(x):
    for _ in range(3):
        train(Net(), x, steps=2)


def words(x):
    train(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2)), torch.arange(8))
    print("ordinary training went on")


def nothing_at_all(x):
    print("done")


def evaluates(x):
    model = Net().eval()
    torch.optim.SGD(model.parameters(), lr=0.1)
    model(x)


def frozen(x):
    model = Net()
    model.stem.requires_grad_(False)
    train(model, x, parameters=list(model.head.parameters()))


class Fickle(Net):
    """Another layer reads the pixels while gradients are kept: no search sees that."""

    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        stem = self.other if torch.is_grad_enabled() else self.stem
        return self.head(stem(x).mean((2, 3)))


def fickle(x):
    warnings.simplefilter("ignore")
    train(Fickle(), x)


def unsupported(x):
    train(Net(nn.ConvTranspose2d(3, 4, 3)), x)


def swallows(x):
    try:
        train(Net(nn.ConvTranspose2d(3, 4, 3)), x)
    except Exception:
        print("never mind")


def enables(x):
    train(tract_hub.enable(Net(), lam=0.5), x)


def parts(x):
    backbone, head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.Linear(4 * 14 * 14, 2)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    head(backbone(x)).square().mean().backward()
    optimizer.step()


def empty_step(x):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    model(x).square().mean().backward()
    optimizer.step()


def closure(x):
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def loss():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(loss)


if __name__ == "__main__":
    torch.manual_seed(0)
    globals()[sys.argv[1]](torch.randn(2, 3, 16, 16))
