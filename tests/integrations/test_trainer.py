"""The Trainer: with an enabled model, by ``optimizer_factory``, and with ``TractCallback``."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback

import tract_hub
from tests import zoo
from tests.integrations.trainers import (
    LAYER,
    LR,
    NAME,
    STEM,
    arguments,
    by_hand,
    trainer,
    weights,
)
from tests.oracle import relative_error


def sgd(groups: list[dict]) -> Optimizer:
    return torch.optim.SGD(groups, LR, 0.9, weight_decay=0.1)


def adamw(groups: list[dict]) -> Optimizer:
    return torch.optim.AdamW(groups, LR, (0.8, 0.9), 1e-3, weight_decay=0.1)


def plain(folder: Path, lam: float = 0.1, scope: str = "local", **options: Any) -> Trainer:
    model = tract_hub.enable(zoo.build(NAME), lam, scope=scope)
    return trainer(model, arguments(folder, **options))


def factory(folder: Path, lam: float = 0.1, scope: str = "local", **options: Any) -> Trainer:
    args = arguments(folder, **options)
    made = tract_hub.optimizer_factory(args, lam, scope=scope)
    return trainer(zoo.build(NAME), args, optimizer_cls_and_kwargs=made)


def callback(folder: Path, lam: float = 0.1, scope: str = "local", **options: Any) -> Trainer:
    callbacks = [tract_hub.TractCallback(lam, scope=scope)]
    return trainer(zoo.build(NAME), arguments(folder, **options), callbacks=callbacks)


def both(folder: Path, lam: float = 0.1, scope: str = "local", **options: Any) -> Trainer:
    run = factory(folder, lam, scope, **options)
    run.add_callback(tract_hub.TractCallback())
    return run


def own_optimizer(folder: Path, lam: float = 0.1, scope: str = "local", **options: Any) -> Trainer:
    run = callback(folder, lam, scope, **options)
    run.optimizer = sgd(run.create_optimizer().param_groups)
    return run


def ordinary(folder: Path, **options: Any) -> Trainer:
    return trainer(zoo.build(NAME), arguments(folder, **options))


ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "trainer_global.py"
WAYS = [plain, factory, callback, both, own_optimizer]
ADAMW = {
    "optim": "adamw_torch",
    "optim_args": None,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-3,
}


def assert_close(got: dict, expected: dict, tolerance: float = 1e-5) -> None:
    for name, weight in expected.items():
        assert relative_error(got[name], weight) < tolerance, name


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_training_is_the_closed_form_in_a_plain_loop(way: Any, tmp_path: Path) -> None:
    run = way(tmp_path)
    run.train()
    expected, _ = by_hand(sgd)
    assert_close(weights(run.model), expected)
    assert relative_error(weights(run.model)[STEM], by_hand(sgd, lam=None)[0][STEM]) > 1e-3


@pytest.mark.parametrize("way", [factory, callback], ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    ("options", "make", "settings"),
    [
        (ADAMW, adamw, {}),
        ({"gradient_accumulation_steps": 3}, sgd, {"accumulate": 3}),
        ({"max_grad_norm": 0.3}, sgd, {"clip": 0.3}),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, sgd, {}),
    ],
    ids=["AdamW", "accumulation", "clipping", "compiled"],
)
def test_each_option_of_the_trainer_sees_the_gradient_of_tract(
    way: Any, options: dict, make: Any, settings: dict, tmp_path: Path
) -> None:
    run = way(tmp_path, **options)
    run.train()
    assert_close(weights(run.model), by_hand(make, **settings)[0])


@pytest.mark.parametrize("way", [factory, callback, own_optimizer], ids=lambda way: way.__name__)
def test_a_global_gradient_is_complete_before_it_is_clipped(way: Any, tmp_path: Path) -> None:
    options = {"max_grad_norm": 0.3, "gradient_accumulation_steps": 2, "logging_steps": 1}
    run = way(tmp_path, scope="global", **options)
    run.train()
    expected, norms = by_hand(sgd, accumulate=2, clip=0.3, together=True)
    assert_close(weights(run.model), expected)
    logged = [logs["grad_norm"] for logs in run.state.log_history if "grad_norm" in logs]
    assert logged == pytest.approx(norms, rel=1e-4)


def test_two_processes_clip_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    saved = []
    for processes in ("1", "2"):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = ["--nproc_per_node", processes, str(SCRIPT), str(tmp_path / processes)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, *script], env=environment, check=True, timeout=120)
        saved.append(torch.load(tmp_path / processes))
    assert_close(saved[1]["weights"], saved[0]["weights"])
    for one, two in zip(saved[0]["logs"], saved[1]["logs"], strict=True):
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert one["grad_norm"] > 0.3


class Reporter(TrainerCallback):
    """Stands where TensorBoard's and W&B's callbacks do: before a user's callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, **parts: Any) -> None:
        self.seen.append({**logs, "step": state.global_step})


class Steps(TrainerCallback):
    """Takes the norm of the gradient that the optimizer is about to step with."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **parts: Any) -> None:
        self.norms.append(float(model.get_parameter(STEM).grad.norm()))


def test_lambda_and_the_norm_of_the_gradient_reach_every_log(tmp_path: Path) -> None:
    reporter, steps = Reporter(), Steps()
    run = trainer(
        zoo.build(NAME),
        arguments(tmp_path, max_grad_norm=0.3),
        callbacks=[reporter, steps, tract_hub.TractCallback(lam=0.2)],
    )
    run.train()
    for step, history in zip((2, 4), (run.state.log_history, reporter.seen), strict=True):
        (logs,) = [logs for logs in history if logs["step"] == step and "loss" in logs]
        assert logs[f"tract/{LAYER}/lam"] == 0.2
        assert logs[f"tract/{LAYER}/grad_norm"] == pytest.approx(steps.norms[step - 1])


def test_measure_says_the_same_in_a_plain_loop() -> None:
    model = tract_hub.enable(zoo.build(NAME), lam=0.2)
    assert tract_hub.measure(model) == {f"tract/{LAYER}/lam": 0.2}
    model(pixel_values=zoo.images(NAME)).logits.square().mean().backward()
    norm = float(model.get_parameter(STEM).grad.norm())
    expected = {f"tract/{LAYER}/lam": 0.2, f"tract/{LAYER}/grad_norm": norm}
    assert tract_hub.measure(model) == pytest.approx(expected)
    assert tract_hub.measure(tract_hub.disable(model)) == {}


def test_the_optimizer_is_the_one_that_the_trainer_would_make(tmp_path: Path) -> None:
    for optim in ("adafactor", "adagrad", "rmsprop", "adamw_torch_fused"):
        run = factory(tmp_path, optim=optim, optim_args=None)
        args, groups = run.args, run.create_optimizer().param_groups
        expected = trainer(run.model, args).create_optimizer()
        assert type(run.optimizer) is type(expected)
        assert [{**group, "params": [id(p) for p in group["params"]]} for group in groups] == [
            {**group, "params": [id(p) for p in group["params"]]} for group in expected.param_groups
        ]
        assert set(run.optimizer.state_dict()) == {"state", "param_groups"}


def test_the_first_layer_may_have_its_own_learning_rate_and_weight_decay(tmp_path: Path) -> None:
    args, model = arguments(tmp_path), zoo.build(NAME)
    made = tract_hub.optimizer_factory(args, stem_lr=0.5, stem_weight_decay=0.2)
    groups = trainer(model, args, optimizer_cls_and_kwargs=made).create_optimizer().param_groups
    (stem,) = [group for group in groups if group["lr"] == 0.5]
    assert [id(p) for p in stem["params"]] == [id(model.get_parameter(STEM))]
    assert stem["weight_decay"] == 0.2
    assert [group["weight_decay"] for group in groups if group is not stem] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def saving(way: Any, folder: Path, **options: Any) -> Trainer:
    return way(folder, save_strategy="steps", save_steps=2, **options)


@pytest.mark.parametrize("way", [ordinary, *WAYS], ids=lambda way: way.__name__)
def test_a_resumed_run_is_the_uninterrupted_one(
    way: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = saving(way, tmp_path / "whole")
    whole.train()
    resumed = saving(way, tmp_path / "resumed")
    with caplog.at_level(logging.WARNING, "tract_hub"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected, got = weights(whole.model), weights(resumed.model)
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    assert not [record for record in caplog.records if record.name.startswith("tract_hub")]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (ordinary, {}, "had no TractCallback; it goes on with"),
        (callback, {"lam": 0.4}, r"0\.1.*0\.4"),
        (factory, {"scope": "global"}, "local.*global"),
    ],
    ids=["ordinary", "lam", "scope"],
)
def test_a_run_that_resumes_with_another_gradient_says_so_once(
    before: Any, after: dict, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving(before, tmp_path).train()
    run = saving(callback, tmp_path, **after)
    with caplog.at_level(logging.WARNING, "tract_hub"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (record,) = [record for record in caplog.records if "resumed" in record.getMessage()]
    assert re.search(message, record.getMessage())


def test_a_checkpoint_notes_a_lambda_that_was_changed_since(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Change(TrainerCallback):
        def on_step_end(self, *_: Any, model: nn.Module, **parts: Any) -> None:
            tract_hub.enable(model, lam=0.4)

    run = saving(callback, tmp_path)
    run.add_callback(Change())
    run.train()
    with caplog.at_level(logging.WARNING, "tract_hub"):
        resumed = saving(callback, tmp_path, lam=0.4)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not [record for record in caplog.records if "resumed" in record.getMessage()]


def test_a_restored_callback_has_its_settings(tmp_path: Path) -> None:
    saving(callback, tmp_path, lam=0.3).train()
    run = saving(callback, tmp_path, lam=0.3, restore_callback_states_from_checkpoint=True)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (restored,) = [c for c in run.callback_handler.callbacks if type(c) is tract_hub.TractCallback]
    assert restored.state()["args"]["lam"] == 0.3


def test_each_model_of_model_init_is_enabled(tmp_path: Path) -> None:
    made: list[nn.Module] = []

    def build() -> nn.Module:
        made.append(zoo.build(NAME))
        return made[-1]

    for settings in (
        {"callbacks": [tract_hub.TractCallback(0.2)]},
        {"optimizer_cls_and_kwargs": tract_hub.optimizer_factory(arguments(tmp_path), 0.2)},
    ):
        run = trainer(None, arguments(tmp_path), model_init=build, **settings)
        run.train()
        run.train()
        assert [state.lam for model in made[-2:] for state in tract_hub.status(model)] == [0.2] * 2


def test_nothing_is_replaced_afterwards(tmp_path: Path) -> None:
    classes = (Trainer, Optimizer, nn.Module, torch.optim.SGD)
    before = [dict(vars(cls)) for cls in classes]
    run = both(tmp_path, scope="global", max_grad_norm=1.0)
    run.train()
    assert [dict(vars(cls)) for cls in classes] == before
    assert "clip_grad_norm_" not in vars(run.accelerator)


def test_a_trainer_of_no_vision_model_stops(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    args = arguments(tmp_path)
    run = trainer(model, args, optimizer_cls_and_kwargs=tract_hub.optimizer_factory(args))
    with pytest.raises(tract_hub.TractError, match="BertForSequenceClassification"):
        run.train()


def test_a_factory_that_the_trainer_passes_over_says_so(tmp_path: Path) -> None:
    run = factory(tmp_path)
    run.optimizer = torch.optim.SGD(run.model.parameters(), 0.1)
    run.train()
    assert not tract_hub.status(run.model)
    with pytest.warns(tract_hub.TractWarning, match="no Trainer asked"):
        run.optimizer_cls_and_kwargs = None
        gc.collect()


def test_an_optimizer_of_deepspeeds_own_is_refused(tmp_path: Path) -> None:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    args = arguments(tmp_path)
    settings = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
    args.deepspeed_plugin = type("Plugin", (), {"hf_ds_config": HfDeepSpeedConfig(settings)})()
    with pytest.raises(tract_hub.TractError, match="take 'optimizer' out"):
        tract_hub.optimizer_factory(args)
