"""Situations from bug reports and questions of other libraries' users."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tract_hub
from tests.oracle import closed_form, conv_rows, corrected_gradients, relative_error


class Net(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, 4, 3, 2, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# Several losses of one graph, as in PCGrad and in logs of each loss's gradient.


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_gradients_of_losses_taken_apart_are_each_right(scope: str, set_to_none: bool) -> None:
    model, x = Net().double(), images(4, 3, 8, 8).double()
    weight = model.conv.weight
    raws = [torch.autograd.grad(model(x)[:, i].square().sum(), weight)[0] for i in (0, 1)]
    rows = conv_rows(x, weight, stride=2, padding=1)
    tract_hub.enable(model, scope=scope)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for _ in range(2):
        losses, apart = model(x).square().sum(0), []
        for loss in losses:
            optimizer.zero_grad(set_to_none)
            loss.backward(retain_graph=True)
            apart.append(weight.grad.clone())
        for got, raw in zip(apart, raws, strict=True):  # with global scope, not yet corrected
            wanted = closed_form(raw, rows, 0.1) if scope == "local" else raw
            assert relative_error(got, wanted) < 1e-11
        weight.grad = apart[0] - 2 * apart[1]
        optimizer.step()
        assert relative_error(weight.grad, closed_form(raws[0] - 2 * raws[1], rows, 0.1)) < 1e-11


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_gradient_that_was_returned_is_no_ones_memory(scope: str) -> None:
    model, x = tract_hub.enable(Net().double(), scope=scope), images(4, 3, 8, 8).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for skipped in (True, False):
        model(x * (2 if skipped else 1)).square().sum().backward()
        if not skipped:
            optimizer.step()
            got = model.conv.weight.grad.clone()
        optimizer.zero_grad(set_to_none=False)
    ordinary = tract_hub.disable(model)
    wanted = corrected_gradients(ordinary, lambda: ordinary(x).square().sum())
    assert relative_error(got, wanted["conv.weight"]) < 1e-11


# Somebody else takes the gradient.


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "ghost"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_opacus_is_refused_in_one_sentence(mode: str, order: str) -> None:
    opacus = pytest.importorskip("opacus")
    model = Net()
    if order == "before":
        tract_hub.enable(model)
    data = torch.utils.data.DataLoader([(x, 0) for x in images(4, 3, 8, 8)], 4)
    private, *_ = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **({"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}),
    )
    with pytest.raises(tract_hub.TractError, match=r"Opacus.*tract_hub\.disable\(model\)"):
        if order == "after":
            tract_hub.enable(private)
        private(images(4, 3, 8, 8))
    tract_hub.disable(private)
    private.eval()(images(4, 3, 8, 8))


# Frozen by recipe.


def detector() -> nn.Module:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    return FasterRCNN(backbone, num_classes=3)


def moco_v3() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    model.patch_embed.requires_grad_(False)  # stop_grad_conv1
    return model


def locked_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    text = {**small, "intermediate_size": 32, "vocab_size": 64, "bos_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config={**text, "eos_token_id": 2}, vision_config=vision))
    model.vision_model.requires_grad_(False)
    return model


def linear_probe() -> nn.Module:
    model = timm.create_model("resnet18").requires_grad_(False)
    model.fc.requires_grad_(True)
    return model


@pytest.mark.parametrize("build", [detector, moco_v3, locked_clip, linear_probe])
def test_a_stem_that_a_recipe_freezes_warns_once(build) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", tract_hub.TractWarning)
        model = tract_hub.enable(build())
    (message,) = (str(w.message) for w in caught if w.category is tract_hub.TractWarning)
    assert "is frozen, so TrAct does nothing" in message and "requires_grad_(True)" in message
    assert [state.frozen for state in tract_hub.status(model)] == [True]


# Compiled, scripted, grey.


def test_changing_image_sizes_compile_as_few_graphs_as_the_ordinary_model() -> None:
    def graphs(model: nn.Module) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = torch.compile(model, backend="aot_eager")
        for side in (64, 48, 80, 40, 56, 72, 88):
            model.zero_grad()
            run(images(2, 3, side, side)).square().sum().backward()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    ordinary, model = graphs(Net()), tract_hub.enable(Net())
    assert graphs(model) == ordinary <= 3
    got, plain = model.conv.weight.grad, tract_hub.disable(model)
    wanted = corrected_gradients(plain, lambda: plain(images(2, 3, 88, 88)).square().sum())
    assert relative_error(got, wanted["conv.weight"]) < 1e-5


SCRIPTED = ["resnet10t", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SCRIPTED)
def test_a_scripted_model_is_the_ordinary_one_and_says_so_when_it_trains(
    name: str, training: bool
) -> None:
    torch.manual_seed(0)
    model = tract_hub.enable(timm.create_model(name, num_classes=2, exportable=True))
    scripted, x = torch.jit.script(model.train(training)), images(2, 3, 224, 224)
    if not training:
        with torch.no_grad():
            assert torch.allclose(scripted(x), model(x), atol=1e-5)
        return
    with pytest.warns(tract_hub.TractWarning, match=r"tract_hub\.enable on the model after"):
        scripted(x).square().sum().backward()
    scripted(x).square().sum().backward()
    assert tract_hub.status(model)[0].applied is False


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_strides_and_bits_are_those_of_the_ordinary_layer(
    form: torch.memory_format, compiled: bool, scope: str, channels: int
) -> None:
    layer = nn.Conv2d(channels, 8, 3, bias=False).to(memory_format=torch.channels_last)
    x = images(2, channels, 12, 12).to(memory_format=form)
    ordinary = layer(x)
    tract_hub.enable(layer, scope=scope)
    torch._dynamo.reset()
    output = torch.compile(layer, backend="aot_eager")(x) if compiled else layer(x)
    assert torch.equal(output, ordinary)
    assert output.stride() == ordinary.stride()
