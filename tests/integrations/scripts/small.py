"""What a training script may do; the first argument says which of it."""

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


class Generator(nn.Module):
    def __init__(self, stem):
        super().__init__()
        self.stem = stem

    def forward(self, z):
        return self.stem(z).view(2, 3, 16, 16).sigmoid()


def train(model, x, steps=1, parameters=None):
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def adversaries(generator, noise, x, every=1):
    discriminator = Net()
    of_generator = torch.optim.Adam(generator.parameters())
    of_discriminator = torch.optim.Adam(discriminator.parameters())
    for step in range(2):
        made = generator(noise)
        (discriminator(made.detach()) - discriminator(x)).mean().backward()
        of_discriminator.step()
        if step % every == every - 1:
            discriminator(made).mean().backward()
            of_generator.step()


def one(x):
    train(Net(), x, steps=3)


def two_phases(x):
    model = Net()
    train(model, x)
    train(model, x, steps=2)


def declared(x):
    global net
    net = Net()
    train(net, x)


def named(x):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, *, pixels=None, **rest):
            return self.net(pixels)

    model = Wrapper()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pixels=x, ids=torch.arange(2)).mean().backward()
    optimizer.step()


def gan(x):
    adversaries(Generator(nn.Linear(16, 768)), torch.randn(2, 16), x)


def gan_of_two_critic_steps(x):
    adversaries(Generator(nn.Linear(16, 768)), torch.randn(2, 16), x, every=2)


def dcgan(x):
    adversaries(Generator(nn.ConvTranspose2d(16, 3, 16)), torch.randn(2, 16, 1, 1), x)


def translation(x):
    adversaries(Generator(nn.Conv2d(3, 3, 1)), x + 1, x)


def upsampling(x):
    adversaries(Generator(nn.ConvTranspose2d(3, 3, 2, 2)), torch.randn(2, 3, 8, 8), x)


def teacher(x):
    teacher, student = Net().train(), Net()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with torch.no_grad():
        wanted = teacher(x)
    (student(x) - wanted).square().mean().backward()
    optimizer.step()
    assert not tract_hub.status(teacher)


def vectors(x):
    train(nn.Sequential(nn.Linear(768, 4), nn.Tanh(), nn.Linear(4, 2)), x.flatten(1))


def vectors_in_folds(x):
    for _ in range(3):
        vectors(x)


def autoencoder(x):
    encoder = nn.Sequential(nn.Linear(768, 4), nn.Tanh())
    decoder = nn.Linear(4, 768)
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.1)
    (decoder(encoder(x.flatten(1))) - x.flatten(1)).square().mean().backward()
    optimizer.step()


def evaluates_halfway(x):
    warnings.simplefilter("ignore")
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for training in (True, False):
        model.train(training)(x).square().mean().backward()
        optimizer.step()


def trains_in_eval_mode(x):
    train(Net().eval(), x)


def exits(x):
    train(Net(), x)
    sys.exit(7)


def exits_well(x):
    train(Net(), x)
    sys.exit()


def raises(x):
    train(Net(), x)
    raise RuntimeError("the disk is full")


def folds(x):
    for _ in range(3):
        train(Net(), x, steps=2)


def words(x):
    train(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2)), torch.arange(8))
    print("ordinary training went on")


def nothing_at_all(x):
    print("done")


def frozen(x):
    model = Net()
    model.stem.requires_grad_(False)
    train(model, x, parameters=list(model.head.parameters()))


class Fickle(Net):
    """Another layer reads the pixels where they have values: no search sees that."""

    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        stem = self.stem if x.is_meta else self.other
        return self.head(stem(x).mean((2, 3)))


def fickle(x):
    warnings.simplefilter("ignore")
    train(Fickle(), x)


def unsupported(x):
    train(Net(nn.ConvTranspose2d(3, 4, 3)), x)


def swallows(x):
    try:
        unsupported(x)
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


def swapped(x):
    """FSDP2 and torchao change the weights of a model that an optimizer has in this way."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        weight = model.stem.weight
        torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone()))


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
