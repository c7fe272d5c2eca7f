"""``TractCallback``: TrAct with any optimizer, and what it did in the Trainer's logs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback

import tract_hub
from tests import zoo
from tests.integrations import trainers
from tests.integrations.trainers import LAYER, LR, STEM, arguments, trainer, weights
from tests.oracle import closed_form, layer_rows, relative_error
from tract_hub.method import gate

QUANTITIES = ("grad_norm_before", "grad_norm_after", "gram_condition", "damping")


class Reporter(TrainerCallback):
    """Sees the logs where TensorBoard's and W&B's callbacks do: before a user's callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, **parts: Any) -> None:
        self.seen.append({"step": state.global_step, **logs})


class OwnOptimizer(Trainer):
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), LR, weight_decay=0.1)
        return self.optimizer


def with_callback(folder: Path, callback: Any, *before: Any, **options: Any) -> Trainer:
    args = arguments(folder, optim="sgd", **{"lr_scheduler_type": "constant", **options})
    return trainer(zoo.build("ViT"), args, callbacks=[*before, callback])


def tract(logs: dict) -> dict[str, float]:
    return {name: value for name, value in logs.items() if name.startswith("tract/")}


def by_the_book(images: Tensor, labels: Tensor, model: nn.Module, lam: float) -> dict[str, float]:
    """The four quantities in float64, from their definitions."""
    model = copy.deepcopy(model).double()
    loss = model(pixel_values=images.double(), labels=labels).loss
    (ordinary,) = torch.autograd.grad(loss, model.get_parameter(STEM))
    rows = layer_rows(model.get_submodule(LAYER), images)
    moment = rows[0].T @ rows[0] / len(rows[0])
    damped = moment + lam * torch.eye(len(moment), dtype=torch.double)
    values = (
        ordinary.norm(),
        closed_form(ordinary, rows, lam).norm(),
        torch.linalg.cond(damped, 2),
        torch.tensor(lam),
    )
    return {f"tract/{LAYER}/{q}": float(v) for q, v in zip(QUANTITIES, values, strict=True)}


def test_what_is_logged_is_what_the_definitions_say(tmp_path: Path) -> None:
    reporter, model = Reporter(), zoo.build("ViT")
    run = with_callback(
        tmp_path, tract_hub.TractCallback(lam=0.2), reporter, max_steps=1, logging_steps=1,
        logging_strategy="steps", gradient_accumulation_steps=2,
    )  # fmt: skip
    run.train()
    expected = by_the_book(*trainers.batch(0), model, 0.2)
    for name in expected:  # the loss of one of two micro-batches counts half
        expected[name] /= 2 if "grad_norm" in name else 1
    for logs in (reporter.seen[0], run.state.log_history[0]):
        assert tract(logs) == pytest.approx(expected, rel=1e-4)


def test_the_rows_of_a_whole_step_are_measured_where_they_are_summed(tmp_path: Path) -> None:
    model = zoo.build("ViT")
    run = with_callback(
        tmp_path, tract_hub.TractCallback(lam=0.2, scope="global"), max_steps=1, logging_steps=1,
        logging_strategy="steps", gradient_accumulation_steps=2,
    )  # fmt: skip
    run.train()
    images, labels = map(torch.cat, zip(trainers.batch(0), trainers.batch(1), strict=True))
    expected = by_the_book(images, labels, model, 0.2)
    assert tract(run.state.log_history[0]) == pytest.approx(expected, rel=1e-4)


def test_the_norms_are_parts_of_the_trainers_own(tmp_path: Path) -> None:
    """The norm that the Trainer clips by is that of TrAct's gradient."""
    norms = []
    for lam in (0.1, 1e6):  # so large a λ leaves nothing of the first layer's gradient
        run = with_callback(
            tmp_path, tract_hub.TractCallback(lam), max_steps=1, logging_steps=1,
            logging_strategy="steps", max_grad_norm=1e3,
        )  # fmt: skip
        run.train()
        norms.append(run.state.log_history[0])
    both, rest = (logs["grad_norm"] for logs in norms)
    after = norms[0][f"tract/{LAYER}/grad_norm_after"]
    assert both**2 - rest**2 == pytest.approx(after**2, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "logged", "measured"),
    [
        ({"logging_strategy": "steps", "logging_steps": 3}, [3, 6], 2),
        (
            {"logging_strategy": "steps", "logging_steps": 4, "logging_first_step": True},
            [1, 4],
            2,
        ),
        ({"logging_strategy": "epoch"}, [3, 6], 2),
        ({"logging_strategy": "no"}, [], 0),
        (
            {
                "logging_strategy": "steps",
                "logging_steps": 3,
                "gradient_accumulation_steps": 2,
            },
            [3, 6],
            2,
        ),
    ],
    ids=["steps", "first step", "epoch", "no", "accumulation"],
)
def test_only_the_steps_that_are_logged_are_measured(
    options: dict, logged: list[int], measured: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    measure = gate.measure
    monkeypatch.setattr(gate, "measure", lambda *given: calls.append(1) or measure(*given))
    args = arguments(tmp_path, max_steps=6, **options)
    batches = 3 * args.gradient_accumulation_steps
    run = trainer(
        zoo.build("ViT"), args, callbacks=[tract_hub.TractCallback(0.1)],
        train_dataset=trainers.dataset(batches),
    )  # fmt: skip
    run.train()
    with_tract = [logs for logs in run.state.log_history if tract(logs)]
    assert [logs["step"] for logs in with_tract] == logged
    assert all("loss" in logs and len(tract(logs)) == 4 for logs in with_tract)
    assert len(calls) == measured


def test_a_compiled_model_trains_and_logs_alike(tmp_path: Path) -> None:
    runs = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        run = with_callback(
            tmp_path, tract_hub.TractCallback(0.1), max_steps=4, logging_steps=2,
            logging_strategy="steps", **options,
        )  # fmt: skip
        run.train()
        runs.append(run)
    eager, compiled = runs
    for name, weight in weights(eager.model).items():
        assert relative_error(weights(compiled.model)[name], weight) < 1e-5, name
    for got, expected in zip(compiled.state.log_history, eager.state.log_history, strict=True):
        assert tract(got) == pytest.approx(tract(expected), rel=1e-4)
    assert len(tract(compiled.state.log_history[1])) == 4


def test_a_model_that_is_not_finite_is_logged_as_such(tmp_path: Path) -> None:
    images, labels = trainers.batch(0)
    images[0, 0, 0, 0] = float("inf")
    examples = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(images, labels, strict=True)
    ]
    args = arguments(tmp_path, max_steps=1, logging_steps=1, logging_strategy="steps")
    run = trainer(
        zoo.build("ViT"), args, callbacks=[tract_hub.TractCallback()], train_dataset=examples
    )
    run.train()
    values = tract(run.state.log_history[0])
    assert values[f"tract/{LAYER}/gram_condition"] != values[f"tract/{LAYER}/gram_condition"]  # NaN


@pytest.mark.parametrize("how", ["optimizers", "subclass"])
def test_any_optimizer_trains_with_tract(how: str, tmp_path: Path) -> None:
    model, args = zoo.build("ViT"), arguments(tmp_path, lr_scheduler_type="constant")
    options: dict = {"callbacks": [tract_hub.TractCallback(lam=0.1)]}
    if how == "optimizers":
        own = torch.optim.SGD(model.parameters(), LR, weight_decay=0.1)
        run = trainer(model, args, optimizers=(own, None), **options)
    else:
        run = OwnOptimizer(model=model, args=args, train_dataset=trainers.Stream(), **options)
    run.train()
    expected = zoo.build("ViT")
    optimizer = torch.optim.SGD(expected.parameters(), LR, weight_decay=0.1)
    for step in range(trainers.STEPS):
        images, labels = trainers.batch(step)
        optimizer.zero_grad()
        expected(pixel_values=images, labels=labels).loss.backward()
        stem = expected.get_parameter(STEM)
        rows = layer_rows(expected.get_submodule(LAYER), images)
        stem.grad = closed_form(stem.grad, rows, 0.1).float()
        optimizer.step()
    for name, weight in weights(expected).items():
        assert relative_error(weights(model)[name], weight) < 1e-5, name


@pytest.mark.parametrize("lam", [0.2, None])
def test_factory_and_callback_together_are_the_factory_alone(
    lam: float | None, tmp_path: Path
) -> None:
    runs = []
    for callbacks in ([], [tract_hub.TractCallback(lam)]):
        args = arguments(tmp_path)
        factory = tract_hub.optimizer_factory(args, lam=0.2)
        run = trainer(zoo.build("ViT"), args, optimizer_cls_and_kwargs=factory, callbacks=callbacks)
        run.train()
        runs.append(weights(run.model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.filterwarnings("ignore::tract_hub.errors.TractWarning")
def test_two_lambdas_for_one_model_stop_the_training(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    run = trainer(
        zoo.build("ViT"),
        args,
        optimizer_cls_and_kwargs=tract_hub.optimizer_factory(args, lam=0.1),
        callbacks=[tract_hub.TractCallback(lam=0.2)],
    )
    with pytest.raises(tract_hub.TractError, match=r"lam=0\.2.*λ=0\.1"):
        run.train()


def test_lambda_changed_in_mid_run_holds_from_there_on(tmp_path: Path) -> None:
    class Change(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step == 2:
                tract_hub.enable(model, lam=0.5)

    run = with_callback(
        tmp_path, tract_hub.TractCallback(0.1), Change(), logging_steps=1, logging_strategy="steps"
    )
    with pytest.warns(tract_hub.TractWarning, match=r"λ changed from 0\.1 to 0\.5"):
        run.train()
    damping = [logs.get(f"tract/{LAYER}/damping") for logs in run.state.log_history]
    assert damping[:4] == pytest.approx([0.1, 0.1, 0.5, 0.5])


@pytest.mark.parametrize("lam", [0.1, None])
def test_a_trainer_that_trains_no_vision_model_stops(lam: float | None, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=2
    )
    model, callback = BertForSequenceClassification(config), tract_hub.TractCallback(lam)
    with pytest.raises(tract_hub.TractError, match="BertForSequenceClassification"):
        trainer(model, arguments(tmp_path), callbacks=[callback]).train()


def test_settings_that_make_no_sense_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="lam"):
        tract_hub.TractCallback(lam=-1)
    with pytest.raises(ValueError, match="scope"):
        tract_hub.TractCallback(scope="world")


def test_each_model_of_model_init_is_enabled(tmp_path: Path) -> None:
    run = trainer(
        None,
        arguments(tmp_path),
        model_init=lambda: zoo.build("ViT"),
        callbacks=[tract_hub.TractCallback(lam=0.3)],
    )
    for _ in range(2):
        before = run.model
        run.train()
        assert run.model is not before
        assert [state.lam for state in tract_hub.status(run.model)] == [0.3]
