"""``optimizer_factory``: the Trainer's own training, but for the first layer's gradient."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer

import tract_hub
from tests import zoo
from tests.integrations import trainers
from tests.integrations.trainers import LR, STEM, arguments, trainer, weights
from tests.oracle import relative_error

OPTIMIZERS = {
    "AdamW": ({"optim": "adamw_torch"}, lambda g: torch.optim.AdamW(g, LR, weight_decay=0.1)),
    "AdamW, betas": (
        {"optim": "adamw_torch_fused", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3},
        lambda g: torch.optim.AdamW(g, LR, (0.8, 0.9), 1e-3, weight_decay=0.1),
    ),
    "SGD": (
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
        lambda g: torch.optim.SGD(g, LR, 0.9, weight_decay=0.1, nesterov=True),
    ),
}

WAYS = {
    "accumulation": ({"gradient_accumulation_steps": 3}, {"accumulate": 3}),
    "clipping": ({"max_grad_norm": 0.3}, {"clip": 0.3}),
    "label smoothing": ({"label_smoothing_factor": 0.2}, {"smoothing": 0.2}),
    "bf16": ({"bf16": True}, {"dtype": torch.bfloat16}),
}


def by_factory(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    args = arguments(folder, **options)
    factory = tract_hub.optimizer_factory(args)
    return trainer(model, args, optimizer_cls_and_kwargs=factory)


def assert_close(got: dict, expected: dict, tolerance: float = 1e-5) -> None:
    for name, weight in expected.items():
        assert relative_error(got[name], weight) < tolerance, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_the_closed_form_in_a_plain_loop(optimizer: str, tmp_path: Path) -> None:
    options, make = OPTIMIZERS[optimizer]
    run = by_factory(zoo.build("ViT"), tmp_path, **options)
    run.train()
    assert_close(weights(run.model), trainers.by_hand(zoo.build("ViT"), make))
    ordinary = trainers.by_hand(zoo.build("ViT"), make, lam=None)
    assert relative_error(weights(run.model)[STEM], ordinary[STEM]) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_each_option_of_the_trainer_sees_the_gradient_of_tract(way: str, tmp_path: Path) -> None:
    options, settings = WAYS[way]
    sgd, make = OPTIMIZERS["SGD"]
    run = by_factory(zoo.build("ViT"), tmp_path, **sgd, **options)
    run.train()
    assert_close(weights(run.model), trainers.by_hand(zoo.build("ViT"), make, **settings))


@pytest.mark.parametrize("name", ["ConvNext", "ResNet"])
def test_other_architectures_train_alike(name: str, tmp_path: Path) -> None:
    options, make = OPTIMIZERS["SGD"]
    run = by_factory(zoo.build(name), tmp_path, **options)
    run.train()
    expected = trainers.by_hand(zoo.build(name), make, stem=zoo.ALL[name].weights[0])
    assert_close(weights(run.model), expected, 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ],
    ids=["checkpointing", "reentrant"],
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_changes_nothing(options: dict, tmp_path: Path) -> None:
    runs = [by_factory(zoo.build("ViT"), tmp_path, **extra) for extra in ({}, options)]
    for run in runs:
        run.train()
    assert_close(weights(runs[1].model), weights(runs[0].model), 2e-5)


def layout(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict]:
    """The groups of an optimizer, with names for parameters."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [
        {k: [names[id(p)] for p in v] if k == "params" else v for k, v in group.items()}
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize(
    "options",
    [{"optim": "adafactor"}, {"optim": "adagrad"}, {"optim": "rmsprop", "optim_args": "alpha=0.9"}],
    ids=lambda options: options["optim"],
)
def test_the_optimizer_is_the_one_that_the_trainer_would_make(
    options: dict, tmp_path: Path
) -> None:
    model = zoo.build("ViT")
    args = arguments(tmp_path, **options)
    ordinary = trainer(model, args).create_optimizer()
    got = by_factory(model, tmp_path, **options).create_optimizer()
    assert type(got) is type(ordinary)
    assert layout(got, model) == layout(ordinary, model)
    assert [group["weight_decay"] for group in got.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_bnb_8bit"])
def test_optimizers_in_8_bits_train(optim: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao" if "torch" in optim else "bitsandbytes")
    run = by_factory(zoo.build("ViT"), tmp_path, optim=optim)
    run.train()
    assert not torch.equal(weights(run.model)[STEM], weights(zoo.build("ViT"))[STEM])


def test_each_model_of_model_init_is_enabled(tmp_path: Path) -> None:
    made = []

    def build() -> nn.Module:
        made.append(zoo.build("ViT"))
        return made[-1]

    args = arguments(tmp_path)
    factory = tract_hub.optimizer_factory(args, lam=0.2)
    run = trainer(None, args, model_init=build, optimizer_cls_and_kwargs=factory)
    run.train()
    first = weights(run.model)
    run.train()
    assert len(made) == 3  # one to look at, one for each training
    assert [state.lam for model in made[1:] for state in tract_hub.status(model)] == [0.2, 0.2]
    assert_close(weights(run.model), first, 1e-12)


class OutOfMemory(nn.Module):
    """Fails on batches larger than a limit, as a GPU does."""

    def __init__(self, model: nn.Module, limit: int) -> None:
        super().__init__()
        self.model, self.limit = model, limit

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Any:
        if len(labels) > self.limit:
            raise RuntimeError("CUDA out of memory.")
        return self.model(pixel_values=pixel_values, labels=labels)


def test_a_smaller_batch_is_found(tmp_path: Path) -> None:
    model = OutOfMemory(zoo.build("ViT"), limit=trainers.BATCH)
    args = arguments(
        tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8, optim="sgd"
    )
    example = dict(zip(("pixel_values", "labels"), trainers.batch(0), strict=True))
    factory = tract_hub.optimizer_factory(args, example_inputs=example)
    run = trainer(model, args, optimizer_cls_and_kwargs=factory)
    run.train()
    assert run._train_batch_size <= trainers.BATCH
    expected = by_factory(
        zoo.build("ViT"), tmp_path, optim="sgd", per_device_train_batch_size=run._train_batch_size
    )
    expected.train()
    assert_close(weights(model.model), weights(expected.model))


def test_a_trainer_that_trains_no_vision_model_stops(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=2
    )
    with pytest.raises(tract_hub.TractError, match="BertForSequenceClassification"):
        by_factory(BertForSequenceClassification(config), tmp_path).train()


def test_a_factory_that_the_trainer_passes_over_says_so(tmp_path: Path) -> None:
    run = by_factory(zoo.build("ViT"), tmp_path)
    run.optimizer = torch.optim.SGD(run.model.parameters(), 0.1)
    run.train()
    assert tract_hub.status(run.model) == ()
    with pytest.warns(tract_hub.TractWarning, match="no Trainer asked"):
        run.optimizer_cls_and_kwargs = None
        gc.collect()


def test_an_optimizer_of_deepspeeds_own_is_refused(tmp_path: Path) -> None:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    args = arguments(tmp_path)
    settings = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}

    class Plugin:
        hf_ds_config = HfDeepSpeedConfig(settings)

    args.deepspeed_plugin = Plugin()
    with pytest.raises(tract_hub.TractError, match="take 'optimizer' out"):
        tract_hub.optimizer_factory(args)
    del settings["optimizer"]
    Plugin.hf_ds_config = HfDeepSpeedConfig(settings)
    cls, order = tract_hub.optimizer_factory(args)
    cls()(zoo.build("ViT"), **order)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lam": 0}, "lam"), ({"scope": "world"}, "scope"), ({"stem_optimizer": "adam"}, "stem_opt")],
    ids=["lam", "scope", "stem_optimizer"],
)
def test_settings_that_make_no_sense_are_refused_at_once(
    options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        tract_hub.optimizer_factory(arguments(tmp_path), **options)


def test_a_model_that_has_another_lambda_takes_the_factorys_and_says_so(tmp_path: Path) -> None:
    run = by_factory(tract_hub.enable(zoo.build("ViT"), lam=0.3), tmp_path)
    with pytest.warns(tract_hub.TractWarning, match=r"λ changed from 0\.3 to 0\.1"):
        run.train()
