"""A Trainer's checkpoints with TrAct: resumed, exchanged with ordinary runs, put in a card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Trainer,
    TrainerCallback,
)

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


def both(folder: Path, lam: float = 0.1) -> Trainer:
    run = factory(folder, lam)
    run.add_callback(tract_hub.TractCallback())
    return run


def ordinary(folder: Path) -> Trainer:
    return trainer(build(), saving(folder), train_dataset=trainers.dataset(4))


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
    "both": both,
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
    "ordinary to callback": (lambda at: own(at, None), own, r"without TractCallback.*λ=0\.1"),
    "ordinary to both": (ordinary, both, r"an ordinary run.*λ=0\.1"),
    "another λ": (factory, lambda at: factory(at, 0.4), r"λ=0\.1.*λ=0\.4"),
    "another λ of the callback": (own, lambda at: own(at, 0.4), r"λ=0\.1.*λ=0\.4"),
    "another λ of both": (both, lambda at: both(at, 0.4), r"λ=0\.1.*λ=0\.4"),
}

SAME = {
    "factory to both": (factory, both),
    "both to factory": (both, factory),
    "both to both": (both, both),
}


@pytest.mark.parametrize("pair", SAME)
def test_a_run_that_resumes_with_the_same_gradient_says_nothing(pair: str, tmp_path: Path) -> None:
    before, after = SAME[pair]
    before(tmp_path).train()
    after(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_resumes_with_another_gradient_says_so(change: str, tmp_path: Path) -> None:
    before, after, message = CHANGES[change]
    before(tmp_path).train()
    run = after(tmp_path)
    with pytest.warns(tract_hub.TractWarning, match=message) as said:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(said.list) == 1
    assert run.state.global_step == 6


def test_a_checkpoint_keeps_the_lambda_that_was_trained_with_last(tmp_path: Path) -> None:
    class Change(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            tract_hub.enable(model, lam=0.4)

    for name, make in (("factory", factory), ("callback", own)):
        run = make(tmp_path / name)
        run.add_callback(Change())
        with pytest.warns(tract_hub.TractWarning, match=r"changed from 0\.1 to 0\.4"):
            run.train()
        make(tmp_path / name, 0.4).train(
            resume_from_checkpoint=str(tmp_path / name / "checkpoint-3")
        )


def test_an_ordinary_run_resumes_from_a_checkpoint_of_tract(tmp_path: Path) -> None:
    whole = factory(tmp_path / "tract")
    whole.train()
    run = ordinary(tmp_path / "ordinary")
    run.train(resume_from_checkpoint=str(tmp_path / "tract" / "checkpoint-3"))
    assert run.state.global_step == 6 and tract_hub.status(run.model) == ()
    assert not torch.equal(weights(run.model)[STEM], weights(whole.model)[STEM])


def stepped(folder: Path, lam: float | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A sharded model and its optimizer after a step, as the factory made it."""
    model = fully_shard(build(), mesh=init_device_mesh("cpu", (1,)))
    args = arguments(folder, optim="sgd", optim_args="momentum=0.9")
    if lam is None:
        optimizer = Trainer(model, args).create_optimizer()
    else:
        cls, order = tract_hub.optimizer_factory(args, lam)
        optimizer = cls()(model, **order)
    images, labels = trainers.batch(0)
    model(pixel_values=images, labels=labels).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(("saved", "loaded"), [(0.1, 0.1), (0.1, None), (None, 0.1)])
def test_distributed_checkpoints_are_those_of_the_ordinary_optimizer(
    saved: float | None, loaded: float | None, tmp_path: Path
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    try:
        state = {"optimizer": get_optimizer_state_dict(*stepped(tmp_path, saved))}
        dcp.save(state, checkpoint_id=tmp_path / "checkpoint")
        model, optimizer = stepped(tmp_path, loaded)
        into = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(into, checkpoint_id=tmp_path / "checkpoint")
        set_optimizer_state_dict(model, optimizer, into["optimizer"])
        got = get_optimizer_state_dict(model, optimizer)["state"]
        for name, values in state["optimizer"]["state"].items():
            momentum = values["momentum_buffer"].full_tensor()
            assert torch.equal(got[name]["momentum_buffer"].full_tensor(), momentum)
    finally:
        dist.destroy_process_group()


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
