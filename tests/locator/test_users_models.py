"""What users' own code puts around, before and beside the first layer."""

import random
import threading

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tract_hub


def sobel():
    return nn.Conv2d(3, 3, 3, padding=1, bias=False).requires_grad_(False)


def frozen(layer):
    return layer.requires_grad_(False)


class Standardised(nn.Module):
    """Standardises by a function, then convolves."""

    def __init__(self, standardise):
        super().__init__()
        self.standardise, self.conv = standardise, nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(self.standardise(x)).relu()


def by_image(x):
    return (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-6)


def by_hand(x):
    centred = x - x.mean((2, 3), keepdim=True)
    return centred / (centred**2).mean((2, 3), keepdim=True).sqrt()


def to_unit_range(x):
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low)


def by_flat_extremes(x):
    flat = x.flatten(1)
    low = flat.min(1).values.view(-1, 1, 1, 1)
    return (x - low) / (flat.max(1)[0].view(-1, 1, 1, 1) - low)


def rounded(x):
    return (x * 255).round().to(torch.uint8).float() / 255


def upside_down(x):
    rows = torch.arange(x.shape[2]).flip(0).view(1, 1, -1, 1)
    return torch.take_along_dim(x, rows, 2)


def between_matrices(x):
    """Blur rows and columns by fixed matrices."""
    rows, columns = torch.eye(x.shape[-2]), torch.eye(x.shape[-1])
    images = [torch.linalg.multi_dot([rows, image, columns]) for image in x.flatten(0, 1)]
    return torch.stack(images).view_as(x)


OWN = "image's own statistics"


@pytest.mark.parametrize(
    ("standardise", "note"),
    [
        (lambda x: (x - 0.5) / 0.25, None),
        (lambda x: x.float() / 255, None),
        (by_image, OWN),
        (by_hand, OWN),
        (to_unit_range, OWN),
        (by_flat_extremes, OWN),
        (lambda x: (x - x.mean()) / x.std(), OWN),
        (nn.InstanceNorm2d(3), "batch_norm"),
        (rounded, "rounding"),
        # Of these pixels, only the shape or the device counts.
        (lambda x: x.masked_fill(torch.zeros(1, 1, 1, 1).bool().expand_as(x), 0), None),
        (lambda x: torch.where(torch.zeros_like(x, dtype=torch.bool), 0.0, x), None),
        (lambda x: x * x.new_ones(x.shape, dtype=torch.bool), None),
        (lambda x: x * (torch.arange(x.shape[-1]) > 3).to(x), None),
        # Constants beside pixels, of which torch asks that they are on one device.
        (upside_down, None),
        (between_matrices, None),
        (lambda x: x.lerp(torch.zeros(()), 0.3), None),
    ],
)
def test_standardised_inside_the_model(standardise, note) -> None:
    (stem,) = tract_hub.locate(Standardised(standardise))
    assert stem.weight_name == "conv.weight"
    assert [note in text for text in stem.notes] == ([True] if note else [])


@pytest.mark.parametrize(
    "nonlinear",
    [
        torch.relu,
        lambda x: x * (x > 0),
        lambda x: torch.where(x > 0.5, x, 0 * x),
        lambda x: x.masked_fill(x < 0, 0),
        lambda x: F.normalize(x, dim=1),
        lambda x: x / x.amax(1, keepdim=True),
        lambda x: x.softmax(1),
        lambda x: x.abs(),
        lambda x: x.long().float(),
        lambda x: x * (x > 0).to(torch.float32),
        lambda x: x * (x > 0).float().detach(),
    ],
)
def test_nonlinear_in_front_is_refused(nonlinear) -> None:
    with pytest.raises(tract_hub.StemNotFoundError, match="stems="):
        tract_hub.locate(Standardised(nonlinear))


class Bytes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image):
        if image.dtype != torch.uint8 or image.is_floating_point():
            raise TypeError("bytes, please")
        image = image.float()
        if image.dtype != torch.float32:
            raise TypeError("it is cast")
        return self.conv(image.permute(0, 3, 1, 2) / 255)


def test_bytes_are_pixels() -> None:
    images = torch.zeros(2, 9, 9, 3, dtype=torch.uint8)
    (stem,) = tract_hub.locate(Bytes(), images)
    assert stem.path == ("permute", "div")
    assert "'image'" in stem.reason or "image" in stem.reason


class ReadsText(nn.Module):
    """Computes the loss of a text in its forward, as OCR models do."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 11)

    def forward(self, image, text):
        scores = self.head(self.conv(image).mean(2).transpose(1, 2)).log_softmax(-1)
        lengths = torch.full((len(image),), scores.shape[1])
        letters = torch.full((len(image),), text.shape[1])
        return F.ctc_loss(scores.transpose(0, 1), text, lengths, letters)


def test_a_loss_that_torch_does_not_know_on_meta_is_followed() -> None:
    inputs = torch.zeros(2, 1, 8, 32), torch.ones(2, 4, dtype=torch.long)
    assert [stem.weight_name for stem in tract_hub.locate(ReadsText(), inputs)] == ["conv.weight"]


class Metadata(nn.Module):
    """An image, and numbers of other kinds beside it."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Linear(8, 4)

    def forward(self, image, other):
        return self.conv(image).mean((2, 3)) + self.other(other).sum()


IMAGE = torch.zeros(2, 3, 9, 9)


@pytest.mark.parametrize("other", [(2, 8), (2, 5, 8), (8,)])
def test_metadata_poses_and_time_are_no_pixels(other) -> None:
    inputs = (IMAGE, torch.zeros(other))
    (stem,) = tract_hub.locate(Metadata(), inputs)
    assert stem.weight_name == "conv.weight"
    assert stem.reason == "reads the pixels of image directly; other not taken for pixels"
    named = {"image": inputs[0], "other": inputs[1]}
    assert [s.weight_name for s in tract_hub.locate(Metadata(), named)] == ["conv.weight"]


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (["image"], ["conv.weight"]),
        (["other"], ["other.weight"]),
        ([1], ["other.weight"]),
        (["image", 1], ["conv.weight", "other.weight"]),
    ],
)
def test_the_user_says_which_inputs_are_pixels(pixels, expected) -> None:
    inputs = (IMAGE, torch.zeros(2, 8))
    assert [s.weight_name for s in tract_hub.locate(Metadata(), inputs, pixels)] == expected


def test_an_unknown_input_is_refused() -> None:
    with pytest.raises(tract_hub.ExampleInputError, match=r"'picture'.*image, other"):
        tract_hub.locate(Metadata(), (IMAGE, torch.zeros(2, 8)), ["picture"])


BACKBONE = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]


@pytest.mark.parametrize(
    ("build", "expected", "noted"),
    [
        (lambda: nn.Sequential(sobel(), nn.Conv2d(3, 8, 3), nn.ReLU()), "1.weight", "0.weight"),
        (lambda: nn.Sequential(sobel(), sobel(), nn.Conv2d(3, 8, 3)), "2.weight", "1.weight"),
        (lambda: frozen(nn.Sequential(*BACKBONE)), "0.weight", None),
        (
            lambda: nn.Sequential(frozen(nn.Sequential(*BACKBONE)), nn.Conv2d(8, 2, 3)),
            "0.0.weight",
            None,
        ),
        (
            lambda: nn.Sequential(sobel(), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3)),
            "0.weight",
            None,
        ),
    ],
)
def test_a_frozen_layer_in_front(build, expected, noted) -> None:
    (stem,) = tract_hub.locate(build())
    assert stem.weight_name == expected
    assert (
        any("frozen" in note and noted in note for note in stem.notes) if noted else not stem.notes
    )


@pytest.mark.parametrize("first", [nn.Conv2d(3, 8, 3), nn.Linear(12, 8)])
def test_a_frozen_layer_whose_bias_is_trained_is_a_frozen_layer(first) -> None:
    model = nn.Sequential(first, nn.ReLU())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    with pytest.warns(tract_hub.TractWarning, match=r"'0\.weight' is frozen"):
        tract_hub.enable(model)


class Sometimes(nn.Module):
    """Draws whether it uses its second layer, as peft's LoHa does with its dropout of 0."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.a(x) + self.b(x) if torch.rand(1) > 0 else self.a(x)


def test_a_number_that_is_drawn_decides_as_it_would() -> None:
    model, state = Sometimes(), torch.get_rng_state()
    assert [stem.weight_name for stem in tract_hub.locate(model)] == ["a.weight", "b.weight"]
    assert torch.equal(torch.get_rng_state(), state)


class SpatialTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.localise = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.to_warp, self.conv = nn.Linear(4, 6), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        warp = self.to_warp(self.localise(x).relu()).view(-1, 2, 3)
        return self.conv(F.grid_sample(x, F.affine_grid(warp, x.shape, False), align_corners=False))


class Refines(nn.Module):
    """Reads the image again, beside what was made of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 3, 3)

    def forward(self, x):
        return self.last(torch.cat([x, self.conv(x).relu()], 1))


@pytest.mark.parametrize(
    ("build", "left_out"), [(SpatialTransformer, "conv.weight"), (Refines, "last.weight")]
)
def test_layers_that_see_changed_pixels_are_noted(build, left_out) -> None:
    stems = tract_hub.locate(build())
    assert len(stems) == 1
    assert any(left_out in note and "stems=" in note for note in stems[0].notes)


class DynamicConvolution(nn.Module):
    """Mixes kernels by what each image is like, as CondConv does."""

    def __init__(self):
        super().__init__()
        self.route, self.kernels = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 8 * 3 * 9))

    def forward(self, x):
        mixed = self.route(x.mean((2, 3))).sigmoid() @ self.kernels
        return F.conv2d(x.flatten(0, 1)[None], mixed.view(-1, 3, 3, 3), groups=len(x))


def test_a_convolution_by_a_weight_made_of_the_pixels_is_noted() -> None:
    (stem,) = tract_hub.locate(DynamicConvolution())
    assert stem.weight_name == "route.weight"
    assert any("weight that is made of them" in note for note in stem.notes)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, one, other):
        return self.conv(one) - self.conv(other)


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.conv(self.conv(x).relu())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(9, 9, bias=False)

    def forward(self, x):
        return F.linear(self.encode(x).relu(), self.encode.weight.t())


@pytest.mark.parametrize(
    ("build", "uses"), [(Siamese, 2), (Again, 1), (Tied, 1)], ids=["siamese", "again", "tied"]
)
def test_a_weight_that_is_used_twice_is_found(build, uses) -> None:
    (stem,) = tract_hub.locate(build())
    assert stem.uses == uses


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("model", "inputs", "word"),
    [
        (nn.LSTM(28, 10), (5, 2, 28), "nn.LSTM"),
        (nn.RNN(28, 10), (5, 2, 28), "nn.RNN"),
        (nn.GRU(28, 10), (5, 2, 28), "nn.GRU"),
        (nn.ConvTranspose2d(3, 4, 3), (2, 3, 9, 9), "nn.ConvTranspose2d"),
        (SelfAttention(), (2, 5, 12), "nn.MultiheadAttention"),
        (torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), (2, 3, 9, 9), "script"),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_a_refusal_names_the_kind_of_module(model, inputs, word, given) -> None:
    with pytest.raises(tract_hub.UnsupportedStemError) as caught:
        tract_hub.locate(model, torch.zeros(inputs) if given else None)
    assert word in str(caught.value)
    assert all(f"{name}=" in str(caught.value) for name in ("stems", "example_inputs", "pixels"))


class AttendsPixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(12, 3)

    def forward(self, x):
        return self.last(F.scaled_dot_product_attention(x, x, x))


def test_attention_on_pixels_is_called_so() -> None:
    with pytest.raises(tract_hub.StemNotFoundError, match=r"'last\.weight' only through an att"):
        tract_hub.locate(AttendsPixels(), torch.zeros(2, 5, 12))


class Holder(nn.Module):
    """Holds what cannot be copied."""

    def __init__(self, held):
        super().__init__()
        self.held, self.others, self.conv = held, {"more": [held]}, nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x)


def test_what_cannot_be_copied_is_in_nobody_s_way(tmp_path) -> None:
    schedule = (0.99 for _ in range(10))
    with (tmp_path / "log").open("w") as log:
        for held in (schedule, threading.Lock(), log, torch.utils.data.DataLoader([1]), lambda: 0):
            (stem,) = tract_hub.locate(Holder(held))
            assert stem.weight_name == "conv.weight"
    assert len(list(schedule)) == 10


class Draws(nn.Module):
    """Draws in eval mode too, from every generator there is."""

    def __init__(self):
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(3, 4, 3), nn.Dropout(0.5)

    def forward(self, x):
        keep = torch.zeros(4).uniform_() < 0.9
        noise = random.random() + numpy.random.rand() + random.randrange(3) + random.gauss(0, 1)
        order = torch.randperm(x.shape[0])
        x = x * torch.distributions.Beta(0.2, 0.2).sample()  # as mixup does
        return self.dropout(self.conv(x[order] + noise) * (1 + keep.any()) * torch.rand(1))


def states():
    return [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]


@pytest.mark.parametrize("training", [True, False])
def test_no_number_is_drawn(training) -> None:
    model = Draws().train(training)
    before = states()
    (stem,) = tract_hub.locate(model)
    assert stem.weight_name == "conv.weight"
    assert states() == before


def test_other_threads_draw_what_they_would_have_drawn() -> None:
    model = Draws()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    expected = [(random.random(), numpy.random.rand(), torch.rand(1).item()) for _ in range(500)]
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    drawn, done = [], threading.Event()

    def draw():
        while not done.is_set() or len(drawn) < 500:
            drawn.append((random.random(), numpy.random.rand(), torch.rand(1).item()))

    thread = threading.Thread(target=draw)
    thread.start()
    for _ in range(5):
        tract_hub.locate(model)
    done.set()
    thread.join()
    assert drawn[:500] == expected


def test_a_model_that_tract_is_on_is_followed_as_the_ordinary_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    conv = model[0]
    conv.forward = lambda x: nn.Conv2d.forward(conv, 2 * x)
    (stem,) = tract_hub.locate(tract_hub.enable(model))
    assert (stem.weight_name, stem.path) == ("0.weight", ("mul",))


class NeedsHook(nn.Module):
    """Reads what a hook stored, as fastai's DynamicUnet does."""

    def __init__(self):
        super().__init__()
        self.conv, self.last, self.stored = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), None
        self.conv.register_forward_hook(self.store)

    def store(self, module, inputs, output):
        self.stored = output

    def forward(self, x):
        self.conv(x)
        return self.last(self.stored.relu())


def test_a_hook_that_the_forward_needs_is_called_on_the_copy() -> None:
    model = NeedsHook()
    (stem,) = tract_hub.locate(model)
    assert stem.weight_name == "conv.weight"
    assert model.stored is None
