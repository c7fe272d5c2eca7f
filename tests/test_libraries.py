"""Models and training loops of other libraries, as their users have them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tract_hub
from tests.oracle import closed_form, conv_rows, corrected_gradients, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

Loss = Callable[[], Tensor]


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()


X = images(2, 3, 64, 64)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16 * 16, 2)
    return nn.Sequential(*layers).double()


def mean_square(output: object) -> Tensor:
    """Of every tensor in what a model returns."""
    if isinstance(output, Tensor):
        return output.square().mean()
    return sum(map(mean_square, output.values() if isinstance(output, dict) else output))


def unet() -> nn.Module:
    return pytest.importorskip("segmentation_models_pytorch").Unet("resnet18", encoder_weights=None)


def segformer() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.Segformer("mit_b0", encoder_weights=None)


def monai_unet() -> nn.Module:
    return pytest.importorskip("monai.networks.nets").UNet(3, 1, 2, (4, 8, 16), (2, 2))


def monai_segresnet() -> nn.Module:
    return pytest.importorskip("monai.networks.nets").SegResNet(3, 8, 4, 2)


def monai_swin() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    return nets.SwinUNETR(1, 2, feature_size=12, spatial_dims=2)


def monai_vit() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    small = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 1, "num_heads": 2}
    return nets.ViT(1, (16, 16, 16), (8, 8, 8), **small)


def yolo() -> nn.Module:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    return tasks.DetectionModel("yolo11n.yaml", verbose=False)


def dynamic_unet() -> nn.Module:
    vision = pytest.importorskip("fastai.vision.all")
    return vision.create_unet_model(vision.resnet18, 2, (64, 64), pretrained=False)


def momentum_twin() -> nn.Module:
    utils = pytest.importorskip("lightly.models.utils")

    class MoCo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = net(), net()
            utils.deactivate_requires_grad(self.key)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                key = self.key(x)
            return self.query(x) * key

    return MoCo()


def masked_vit() -> nn.Module:
    lightly = pytest.importorskip("lightly.models.modules")
    timm = pytest.importorskip("timm")

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
            self.vit = lightly.MaskedVisionTransformerTIMM(vit=vit)

        def forward(self, x: Tensor) -> Tensor:
            return self.vit.encode(x, idx_keep=torch.tensor([[0, 1, 3], [0, 2, 5]]))

    return Masked()


def checkpointed_vit() -> nn.Module:
    model = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", depth=2, img_size=64)
    model.set_grad_checkpointing(True)
    return model


class Unfolded(nn.Module):
    """Patches by nn.Unfold, and a Linear; or a raw product."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.linear, self.raw = nn.Linear(192, 6), raw

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 8, stride=8).transpose(1, 2)
        product = F.linear(patches, self.linear.weight) if self.raw else self.linear(patches)
        return product.relu().mean((1, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "smp Unet": (unet, X),
    "smp Segformer": (segformer, X),
    "monai UNet, 3-d": (monai_unet, images(1, 1, 16, 16, 16)),
    "monai SegResNet, 3-d, 4 channels": (monai_segresnet, images(1, 4, 16, 16, 16)),
    "monai SwinUNETR": (monai_swin, images(1, 1, 64, 64)),
    "monai ViT, 3-d": (monai_vit, images(2, 1, 16, 16, 16)),
    "Ultralytics YOLO11n": (yolo, X),
    "fastai DynamicUnet": (dynamic_unet, X),
    "lightly MoCo": (momentum_twin, X),
    "lightly masked ViT": (masked_vit, X),
    "timm with checkpointing": (checkpointed_vit, X),
    "nn.Unfold and a Linear": (lambda: Unfolded(False), X),
    "nn.Unfold and a product": (lambda: Unfolded(True), X),
}


@pytest.mark.filterwarnings("ignore::tract_hub.errors.TractWarning")  # notes of what else there is
@pytest.mark.parametrize("name", MODELS)
def test_a_library(name: str) -> None:
    build, x = MODELS[name]
    torch.manual_seed(0)
    model = build().double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    state = copy.deepcopy(model.state_dict())
    tract_hub.enable(model, example_inputs=x)
    stems = [stem.weight_name for stem in tract_hub.status(model) if not stem.frozen]
    assert stems
    torch.manual_seed(3)  # of drop path
    mean_square(model(x)).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.load_state_dict(state)
    ordinary = tract_hub.disable(model)
    torch.manual_seed(3)
    wanted = corrected_gradients(ordinary, lambda: mean_square(ordinary(x)))
    for key, gradient in wanted.items():
        assert relative_error(got[key], gradient) < 1e-11, key


# Training loops.


def lightning_trainer(**settings: object):
    lightning = pytest.importorskip("lightning")
    quiet = "logger enable_checkpointing enable_progress_bar enable_model_summary".split()
    off = dict.fromkeys(quiet, False)
    return lightning, lightning.Trainer(max_epochs=1, accelerator="cpu", **off, **settings)


def test_lightning_accumulates_with_global_scope() -> None:
    lightning, trainer = lightning_trainer(accumulate_grad_batches=2)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = tract_hub.enable(net(), scope="global")

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        def on_before_optimizer_step(self, _: object) -> None:
            tract_hub.finish(self.net)
            self.got = self.net[0].weight.grad.clone()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    module, ordinary = Module(), net()
    trainer.fit(module, DataLoader(TensorDataset(X), 1))
    (raw,) = torch.autograd.grad(ordinary(X).square().mean(), ordinary[0].weight)
    wanted = closed_form(raw, conv_rows(X, raw, stride=4), 0.1)
    assert relative_error(module.got, wanted) < 1e-11


def test_lightning_with_two_optimizers_by_hand() -> None:
    lightning, trainer = lightning_trainer()

    class Gan(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator = nn.ConvTranspose2d(4, 3, 4, 2, 1).double()
            self.critic = tract_hub.enable(net())

        def training_step(self, batch: list[Tensor], _: int) -> None:
            first, second = self.optimizers()
            self.fake = self.generator(images(2, 4, 32, 32))
            self.manual_backward(self.loss(self.critic, batch[0], self.fake.detach()))
            self.got = self.critic[0].weight.grad.clone()
            second.step()
            first.zero_grad()
            self.manual_backward(-self.critic(self.fake).mean())
            first.step()

        @staticmethod
        def loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
            return critic(real).square().mean() - critic(fake).square().mean()

        def configure_optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
            return tuple(
                torch.optim.SGD(m.parameters(), 0.1) for m in (self.generator, self.critic)
            )

    module, ordinary = Gan(), net()
    trainer.fit(module, DataLoader(TensorDataset(X), 2))
    fake = module.fake.detach()
    wanted = corrected_gradients(ordinary, lambda: module.loss(ordinary, X, fake))
    assert relative_error(module.got, wanted["0.weight"]) < 1e-11


def test_fastai_learner() -> None:
    vision = pytest.importorskip("fastai.vision.all")
    model, ordinary = tract_hub.enable(net().float()), net()
    data = vision.DataLoader(TensorDataset(X.float(), torch.tensor([0, 1])), bs=2)
    learner = vision.Learner(
        vision.DataLoaders(data, data), model, nn.CrossEntropyLoss(), vision.SGD, lr=0.1
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, wd=0)
    loss = nn.CrossEntropyLoss()
    wanted = corrected_gradients(ordinary, lambda: loss(ordinary(X), torch.tensor([0, 1])))
    for name, parameter in ordinary.named_parameters():
        step = (parameter.detach() - model.get_parameter(name)) / 0.1
        assert relative_error(step, wanted[name]) < 1e-4, name  # of weights in float32


def test_lbfgs() -> None:
    model, ordinary, seen = tract_hub.enable(net()), net(), []
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        seen.append(model[0].weight.grad.clone())
        return loss

    optimizer.step(closure)
    wanted = corrected_gradients(ordinary, lambda: ordinary(X).square().mean())
    assert relative_error(seen[0], wanted["0.weight"]) < 1e-11


def test_gradient_penalty() -> None:
    model = net()
    model[1] = nn.Softplus()

    def gradient() -> Tensor:
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        loss = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(loss, model[0].weight)[0]

    wanted = closed_form(gradient(), conv_rows(X, model[0].weight, stride=4), 0.1)
    tract_hub.enable(model)
    assert relative_error(gradient(), wanted) < 1e-11


def test_averaged_model_and_its_statistics() -> None:
    model = nn.Sequential(*net()[:1], nn.BatchNorm2d(4), *net()[2:]).double()
    tract_hub.enable(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    torch.optim.swa_utils.update_bn([X], average)
    assert [s.weight_name for s in tract_hub.status(average)] == ["module.0.weight"]
