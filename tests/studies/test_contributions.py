"""What single images give to the first layer, against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tract_hub
from tests.studies.comparisons import TRACT, tiny_study
from tract_hub.errors import ModelError
from tract_hub.studies.compare.records import ORDINARY
from tract_hub.studies.compare.report import contributions
from tract_hub.studies.compare.report.contributions import image_terms, measure_contributions
from tract_hub.studies.compare.report.groups import shares, shares_table
from tract_hub.studies.compare.training import fresh_model

IMAGES, LAM = 5, 0.1


def convolution(channels: int) -> nn.Module:
    conv = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
    return nn.Sequential(conv, nn.GELU(), nn.Flatten(), nn.Linear(4 * 9, 3))


def linear(channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 36, 7), nn.Tanh(), nn.Linear(7, 3))


def in_place(channels: int) -> nn.Module:
    conv = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 9, 3))


def rows_of(model: nn.Module, images: Tensor) -> Tensor:
    """X of the whole batch, rows × features."""
    if isinstance(model[0], nn.Flatten):
        return images.flatten(1)
    unfolded = F.unfold(images, 3, padding=1, stride=2)
    return unfolded.transpose(1, 2).flatten(0, 1)


def batch(channels: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    scales = torch.linspace(0.2, 3, IMAGES, dtype=torch.float64)[:, None, None, None]
    images = scales * torch.randn(IMAGES, channels, 6, 6, dtype=torch.float64) + 0.5
    return images, torch.arange(IMAGES) % 3


def terms_of(model: nn.Module, channels: int, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    images, labels = batch(channels)
    (stem,) = tract_hub.locate(model, example_inputs=images)
    whole, terms = image_terms(model, stem, images, labels, smoothing)
    return whole, torch.stack(list(terms))


def inverse_gram(X: Tensor) -> Tensor:
    return torch.linalg.inv(X.T @ X / len(X) + LAM * torch.eye(X.shape[1], dtype=X.dtype))


def image_by_image(
    model: nn.Module, images: Tensor, labels: Tensor, smoothing: float, weight: Tensor
) -> Tensor:
    """The plain gradients of each image's own loss, images × out × features."""
    gradients = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        loss = F.cross_entropy(model(image), label, label_smoothing=smoothing) / len(images)
        gradients.append(torch.autograd.grad(loss, weight)[0].flatten(1))
    return torch.stack(gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("make", [convolution, linear, in_place])
def test_a_term_is_the_images_gradient_by_the_inverse_gram_of_the_batch(make, channels, smoothing):
    torch.manual_seed(0)
    model = make(channels).double().train()
    images, labels = batch(channels)
    ordinary = image_by_image(model, images, labels, smoothing, next(model.parameters()))
    terms = terms_of(model, channels, smoothing)[1]
    torch.testing.assert_close(terms.flatten(2), ordinary)
    tract_hub.enable(model, lam=LAM, example_inputs=images)
    whole, terms = terms_of(model, channels, smoothing)
    torch.testing.assert_close(terms.flatten(2), ordinary @ inverse_gram(rows_of(model, images)))
    torch.testing.assert_close(terms.sum(0), whole)


def test_behind_a_batch_norm_a_term_is_of_the_images_own_rows():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
    model = nn.Sequential(conv, norm, nn.Flatten(), nn.Linear(36, 3)).double().train()
    images, labels = batch(2)
    X = rows_of(model, images)
    outputs = conv(images)
    (arriving,) = torch.autograd.grad(F.cross_entropy(model[1:](outputs), labels), outputs)
    expected = arriving.flatten(2) @ X.reshape(IMAGES, 9, -1) @ inverse_gram(X)
    tract_hub.enable(model, lam=LAM, example_inputs=images)
    torch.testing.assert_close(terms_of(model, 2)[1].flatten(2), expected)


class PositionsFirst(nn.Module):
    """Its stem gives positions × images × features, with as many positions as images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stem(images[:, 0, :IMAGES].transpose(0, 1)).mean(0))


def test_outputs_that_are_not_of_one_image_after_the_other_are_refused():
    with pytest.raises(ModelError, match="stem gives cannot be told apart"):
        terms_of(PositionsFirst().double().train(), 1)


def test_the_measurement_is_of_the_start_weights_on_training_images():
    study = tiny_study(label_smoothing=0.1)
    measured = measure_contributions(study)
    assert measured["arms"] == ["ordinary", "TrAct λ=0.1"]
    assert (measured["seed"], measured["batch"]) == (0, 32)
    assert measured["residual"] < 1e-4
    (images, labels), *_ = batches = contributions._batches(study)
    pixels = torch.cat([images for images, _ in batches]).flatten(1) / 255
    assert len(pixels) == 128
    assert measured["brightness"] == pytest.approx(pixels.mean(1).tolist(), abs=1e-4)
    assert measured["contrast"] == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-4)
    # Of the first batch, by hand: 8 × 8 pixels in patches of 4 × 4.
    inputs = study.data.normaliser()(images)
    X = F.unfold(inputs, 4, stride=4).transpose(1, 2).flatten(0, 1)
    model = fresh_model(study, ORDINARY, 0).train()
    ordinary = image_by_image(
        model, inputs, labels, 0.1, model.get_parameter(study.stems[0].weight_name)
    )
    for arm, expected in ((ORDINARY, ordinary), (TRACT, ordinary @ inverse_gram(X))):
        norms = expected.flatten(1).norm(dim=1).tolist()
        assert measured["norms"][str(arm)][:32] == pytest.approx(norms, rel=1e-3)


def measured_norms(**norms: list[float | None]) -> dict[str, object]:
    return {
        "brightness": [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
        "contrast": [0.0, 0.7, 0.1, 0.6, 0.2, 0.5, 0.3, 0.4],
        "norms": norms,
    }


def test_groups_are_quarters_by_brightness_and_contrast():
    measured = measured_norms(one=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], two=[3.0] * 8)
    found = shares(measured)
    # darkest: 7, 6; brightest: 0, 1; lowest contrast: 0, 2; highest: 1, 3; the mean is 4.5.
    assert [share.ratio for share in found["one"]] == pytest.approx(
        [7.5 / 4.5, 1.5 / 4.5, 2 / 4.5, 3 / 4.5]
    )
    assert [share.error for share in found["one"]] == pytest.approx(
        [0.5 / 4.5, 0.5 / 4.5, 1 / 4.5, 1 / 4.5]
    )
    assert [share.ratio for share in found["two"]] == [1.0] * 4
    table = shares_table(found, measured)
    assert table.head == ("", "one", "two")
    assert table.rows[0] == ("darkest quarter", "1.67 ± 0.11", "1.00 ± 0.00")
    assert table.rows[-1] == ("deviation of all images", "0.51", "0.00")


@pytest.mark.parametrize("norms", [[0.0] * 8, [None] + [1.0] * 7])
def test_there_are_no_groups_where_there_is_no_gradient(norms):
    assert shares(measured_norms(one=[1.0] * 8, two=norms)) is None
