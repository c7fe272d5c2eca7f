"""Modules of no zoo: rank, channels and size are found from what the layers want."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error


class LeNet(nn.Module):
    def __init__(self, channels, side):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 5), nn.Conv2d(6, 16, 5)
        self.head = nn.Linear(16 * side**2, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(x.view(-1, self.head.in_features))


class LinearPatches(nn.Module):
    def __init__(self, patch, positions):
        super().__init__()
        self.patch, self.embed = patch, nn.Linear(3 * patch**2, 32)
        self.positions = nn.Parameter(torch.zeros(1, positions, 32))

    def forward(self, x):
        batch, channels, height, width = x.shape
        p = self.patch
        x = x.reshape(batch, channels, height // p, p, width // p, p)
        return self.embed(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)) + self.positions


class FlattensItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x):
        batch, channels, height, width = x.shape
        return self.layer(x.reshape(batch, channels * height * width))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, one, other):
        return self.left(one) + self.right(other)


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x.permute(0, 3, 1, 2))


class AddsCoordinates(nn.Module):
    """As CoordConv does, or a Perceiver, whose channels are last."""

    def __init__(self, channels, axis):
        super().__init__()
        self.axis = axis
        self.layer = nn.Conv2d(channels + 2, 4, 3) if axis == 1 else nn.Linear(channels + 2, 4)

    def forward(self, x):
        size = [*x.shape]
        size[self.axis] = 2
        return self.layer(torch.cat([x, torch.rand(size)], self.axis))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(4, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.kernel)


class ByName(Functional):
    def forward(self, *, images, mask=None):
        return F.conv2d(images, self.kernel)


class ByOptionalName(Functional):
    def forward(self, *, images=None):
        return F.conv2d(images, self.kernel)


class WithItsLoss(Functional):
    def forward(self, images, labels):
        return F.cross_entropy(F.conv2d(images, self.kernel).mean((2, 3)), labels)


class FromBatch(ChannelsLast):
    def forward(self, batch):
        return self.conv(batch["image"])


class ImageAndText(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.words = nn.Conv2d(3, 4, 3), nn.Embedding(10, 4)

    def forward(self, image, ids):
        return self.conv(image).mean() + self.words(ids).mean()


class AssertsItsSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if x.shape[-1] % 256:
            raise ValueError("images of a multiple of 256 pixels, please")
        return self.conv(x)


class NeverReads(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.picture = nn.Conv2d(3, 4, 3), nn.Parameter(torch.zeros(1, 3, 9, 9))

    def forward(self, x):
        return self.conv(self.picture)


def clip_net():
    pooled = nn.Sequential(nn.Conv3d(3, 8, 3, 2, 1), nn.MaxPool3d(4), nn.Flatten())
    return nn.Sequential(*pooled, nn.Linear(8 * 2 * 10 * 10, 3))


def sound_net():
    return nn.Sequential(nn.Conv1d(1, 8, 64, 16), nn.ReLU(), nn.Flatten(), nn.Linear(800, 2))


FOUND = [
    (lambda: LeNet(3, 5), ["conv1.weight"]),
    (lambda: LeNet(1, 4), ["conv1.weight"]),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), ["1.weight"]),
    (FlattensItself, ["layer.weight"]),
    (lambda: LinearPatches(8, 16), ["embed.weight"]),
    (lambda: LinearPatches(16, 196), ["embed.weight"]),
    (clip_net, ["0.weight"]),
    (sound_net, ["0.weight"]),
    (Pair, ["left.weight", "right.weight"]),
    (ChannelsLast, ["conv.weight"]),
    (lambda: AddsCoordinates(1, 1), ["layer.weight"]),
    (lambda: AddsCoordinates(4, 1), ["layer.weight"]),
    (lambda: AddsCoordinates(3, 3), ["layer.weight"]),
    (AssertsItsSize, ["conv.weight"]),
    (Functional, ["kernel"]),
    (ByName, ["kernel"]),
    (ByOptionalName, ["kernel"]),
    (WithItsLoss, ["kernel"]),
    (lambda: nn.Linear(5, 2), ["weight"]),
    (lambda: nn.Conv2d(2, 4, 3, groups=2), ["weight"]),
]


@pytest.mark.parametrize(("build", "expected"), FOUND)
def test_inputs_are_guessed(build, expected) -> None:
    assert [stem.weight_name for stem in tract_hub.locate(build())] == expected


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3)),
        nn.Sequential(nn.LayerNorm([1, 28, 28]), nn.Conv2d(1, 4, 3)),
    ],
)
def test_trainable_layer_in_front_is_noted(model) -> None:
    (stem,) = tract_hub.locate(model)
    assert stem.weight_name == "1.weight"
    assert "0.weight" in stem.notes[0]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (FromBatch(), {"image": torch.zeros(1, 3, 9, 9)}),
        (ImageAndText(), {"image": torch.zeros(1, 3, 9, 9), "ids": torch.zeros(1, 4).long()}),
        (ImageAndText(), (torch.zeros(1, 3, 9, 9), torch.zeros(1, 4).long())),
    ],
)
def test_inputs_that_are_given(model, inputs) -> None:
    assert [stem.weight_name for stem in tract_hub.locate(model, inputs)] == ["conv.weight"]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 2)), "ExampleInputError", "indices"),
        (ImageAndText(), "ExampleInputError", "'words.weight'.*example_inputs="),
        (FromBatch(), "ExampleInputError", "FromBatch.*example_inputs="),
        (nn.Sequential(nn.Sigmoid(), nn.Conv2d(3, 4, 3)), "StemNotFoundError", "sigmoid.*stems="),
        (NeverReads(), "StemNotFoundError", "NeverReads.*stems="),
        (nn.ReLU(), "StemNotFoundError", "ReLU.*stems="),
        (nn.LSTM(28, 10), "UnsupportedStemError", "LSTM.*stems="),
        (nn.LazyConv2d(3, 3), "ExampleInputError", "run one forward, then enable TrAct"),
    ],
)
def test_refusals_say_what_reached_what_and_what_to_pass(model, error, message) -> None:
    with pytest.raises(getattr(tract_hub, error), match=message):
        tract_hub.locate(model)


def test_indices_are_no_pixels() -> None:
    with pytest.raises(tract_hub.ExampleInputError, match="no tensor of pixels"):
        tract_hub.locate(ImageAndText(), torch.zeros(1, 4, dtype=torch.long))


def test_only_modules_are_located() -> None:
    with pytest.raises(TypeError, match="got str"):
        tract_hub.locate("resnet50")


def standardise(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return ((inputs[0] - 0.5) / 0.25,)


@pytest.mark.parametrize(
    ("owner", "says"),
    [("0", "the forward pre-hook of 0"), ("", "the forward pre-hook of the model")],
)
def test_a_hook_that_is_not_called_is_spoken_of(owner: str, says: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 2).double())
    handle = model.get_submodule(owner).register_forward_pre_hook(standardise)
    expected = f"reads the pixels of input directly, or what {says} makes of them"
    assert tract_hub.locate(model)[0].reason == expected
    assert tract_hub.locate(tract_hub.enable(model))[0].reason == expected
    handle.remove()
    assert tract_hub.locate(model)[0].reason == "reads the pixels of input directly"


def test_what_a_pre_hook_makes_of_the_pixels_is_the_layer_s_input() -> None:
    torch.manual_seed(0)
    conv, images = nn.Conv2d(3, 2, 2).double(), torch.rand(4, 3, 6, 6, dtype=torch.double)
    conv.register_forward_pre_hook(standardise)
    gradients = []
    for change in (tract_hub.disable, tract_hub.enable):
        change(conv).zero_grad()
        conv(images).square().sum().backward()
        gradients.append(conv.weight.grad.clone())
    rows = layer_rows(conv, standardise(conv, (images,))[0])
    assert relative_error(gradients[1], closed_form(gradients[0], rows, 0.1)) < 1e-12


class OtherInTraining(nn.Module):
    """Has two branches in training; in eval mode one of them, or one kernel made of both."""

    def __init__(self, fused: bool):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.fused = fused

    def forward(self, x):
        if self.training:
            return self.wide(x) + self.narrow(x)
        kernel = self.wide.weight
        if self.fused:
            kernel = kernel + F.pad(self.narrow.weight, (1, 1, 1, 1))
        return F.conv2d(x, kernel, padding=1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_first_layers_are_those_of_a_forward_in_training(fused: bool, mode: bool) -> None:
    model, x = OtherInTraining(fused).train(mode).double(), torch.randn(4, 3, 8, 8).double()
    model.train()
    layers = {"narrow": model.narrow, "wide": model.wide}
    weights = [layer.weight for layer in layers.values()]
    raw = torch.autograd.grad(model(x).square().sum(), weights)
    tract_hub.enable(model.train(mode))
    assert model.training is mode
    assert [s.weight_name for s in tract_hub.status(model)] == ["narrow.weight", "wide.weight"]
    model.train()(x).square().sum().backward()
    for layer, gradient in zip(layers.values(), raw, strict=True):
        expected = closed_form(gradient, layer_rows(layer, x), 0.1)
        assert relative_error(layer.weight.grad, expected) < 1e-11


def test_a_forward_that_needs_labels_in_training_is_followed_without() -> None:
    class NeedsLabels(nn.Sequential):
        def forward(self, x, labels=None):
            if self.training and labels is None:
                raise ValueError("labels, please")
            return super().forward(x)

    (stem,) = tract_hub.locate(NeedsLabels(nn.Conv2d(3, 4, 3)))
    assert stem.weight_name == "0.weight"
