"""A Trainer's checkpoints with TrAct: resumed, exchanged with ordinary runs, put in a card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification, Trainer

import tract_hub
from tests import zoo
from tests.integrations import trainers
from tests.integrations.trainers import arguments, trainer, weights

# Not a ViT: Transformers 5 does not load all of its keys back when a Trainer resumes.
STEM = zoo.ALL["ConvNext"].weights[0]


def build() -> nn.Module:
    """A model whose every step draws random numbers."""
    torch.manual_seed(0)
    stages = {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1]}
    return ConvNextForImageClassification(
        ConvNextConfig(**stages, image_size=32, drop_path_rate=0.5, num_labels=zoo.CLASSES)
    )


def saving(folder: Path, **options: Any) -> Any:
    return arguments(folder, max_steps=6, save_strategy="steps", save_steps=3, **options)


def factory(folder: Path, lam: float = 0.1, **options: Any) -> Trainer:
    args = saving(folder)
    made = tract_hub.optimizer_factory(args, lam, **options)
    return trainer(build(), args, optimizer_cls_and_kwargs=made, train_dataset=trainers.dataset(4))


def ordinary(folder: Path, **options: Any) -> Trainer:
    return trainer(build(), saving(folder), train_dataset=trainers.dataset(4), **options)


def own(folder: Path, lam: float | None = 0.1) -> Trainer:
    """A Trainer with an optimizer of the user's own; ``lam=None`` is without TrAct."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return trainer(
        model,
        saving(folder),
        optimizers=(optimizer, None),
        callbacks=[] if lam is None else [tract_hub.TractCallback(lam)],
        train_dataset=trainers.dataset(4),
    )


RUNS: dict[str, Callable[[Path], Trainer]] = {
    "ordinary": ordinary,
    "factory": factory,
    "factory, SGD for the stem": lambda folder: factory(folder, stem_optimizer="sgd", stem_lr=0.05),
    "factory, group for the stem": lambda folder: factory(folder, stem_lr=0.05),
    "callback": own,
}


@pytest.mark.parametrize("how", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(how: str, tmp_path: Path) -> None:
    whole = RUNS[how](tmp_path / "whole")
    whole.train()
    resumed = RUNS[how](tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    expected, got = weights(whole.model), weights(resumed.model)
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    if how == "ordinary":
        assert tract_hub.status(whole.model) == ()


CHANGES = {
    "ordinary to factory": (ordinary, factory, r"an ordinary run.*λ=0\.1"),
    "ordinary to callback": (lambda at: own(at, None), own, r"an ordinary run.*λ=0\.1"),
    "another λ": (factory, lambda at: factory(at, 0.4), r"λ=0\.1.*λ=0\.4"),
    "another λ of the callback": (own, lambda at: own(at, 0.4), r"λ=0\.1.*λ=0\.4"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_resumes_with_another_gradient_says_so(change: str, tmp_path: Path) -> None:
    before, after, message = CHANGES[change]
    before(tmp_path).train()
    run = after(tmp_path)
    with pytest.warns(tract_hub.TractWarning, match=message) as said:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(said.list) == 1
    assert run.state.global_step == 6


def test_an_ordinary_run_resumes_from_a_checkpoint_of_tract(tmp_path: Path) -> None:
    whole = factory(tmp_path / "tract")
    whole.train()
    run = ordinary(tmp_path / "ordinary")
    run.train(resume_from_checkpoint=str(tmp_path / "tract" / "checkpoint-3"))
    assert run.state.global_step == 6 and tract_hub.status(run.model) == ()
    assert not torch.equal(weights(run.model)[STEM], weights(whole.model)[STEM])


def test_other_groups_than_those_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    ordinary(tmp_path).train()
    run = factory(tmp_path, stem_lr=0.05)
    with pytest.raises(tract_hub.TractError, match=r"2 groups.*this run's 3.*stem_lr"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_best_model_is_loaded_and_stays_enabled(tmp_path: Path) -> None:
    args = saving(
        tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        learning_rate=1.0, lr_scheduler_type="constant",
    )  # fmt: skip
    run = trainer(
        build(),
        args,
        optimizer_cls_and_kwargs=tract_hub.optimizer_factory(args),
        train_dataset=trainers.dataset(4),
        eval_dataset=trainers.dataset(1),
    )
    run.train()
    best = type(run.model).from_pretrained(run.state.best_model_checkpoint)
    got, expected = weights(run.model), weights(best)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert [state.lam for state in tract_hub.status(run.model)] == [0.1]


def test_a_model_card_says_how_the_first_layer_was_trained(tmp_path: Path) -> None:
    run = factory(tmp_path, lam=0.2)
    run.train()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("- tract:")]
    assert f"`{STEM}`" in line and "λ=0.2" in line
    assert card.index("hyperparameters were used") < card.index(line) < card.index("- seed: 42")
    tract_hub.disable(run.model)
    run.create_model_card()
    assert "tract:" not in (tmp_path / "README.md").read_text()
