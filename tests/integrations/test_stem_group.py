"""Learning rate, weight decay and update rule of the first layers' own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import tract_hub
from tests import zoo
from tests.integrations import trainers
from tests.integrations.trainers import LAYER, LR, STEM, arguments, trainer, weights
from tests.oracle import closed_form, layer_rows, relative_error
from tract_hub.integrations.trainer.two_optimizers import TwoOptimizers


def by_factory(folder: Path, options: dict | None = None, **stem: Any) -> Trainer:
    args = arguments(folder, **(options or {}))
    factory = tract_hub.optimizer_factory(args, **stem)
    return trainer(zoo.build("ViT"), args, optimizer_cls_and_kwargs=factory)


def group_of_the_stem(run: Trainer) -> dict[str, Any]:
    stem = run.model.get_parameter(STEM)
    (group,) = [g for g in run.optimizer.param_groups if any(p is stem for p in g["params"])]
    return group


def test_without_options_the_stem_stays_where_it_was(tmp_path: Path) -> None:
    run = by_factory(tmp_path)
    run.create_optimizer()
    assert len(run.optimizer.param_groups) == 2
    assert len(group_of_the_stem(run)["params"]) > 1


@pytest.mark.parametrize(
    ("stem", "lr", "decay"),
    [
        ({"stem_lr": 0.5}, 0.5, 0.1),
        ({"stem_lr": 0.0}, 0.0, 0.1),
        ({"stem_weight_decay": 0.0}, LR, 0.0),
        ({"stem_optimizer": "sgd"}, LR, 0.1),
        ({"stem_optimizer": "sgd", "stem_lr": 0.5, "stem_weight_decay": 0.3}, 0.5, 0.3),
        ({"stem_optimizer": (torch.optim.Adagrad, {"eps": 1e-3})}, LR, 0.1),
    ],
    ids=str,
)
def test_the_stem_has_a_group_of_its_own(
    stem: dict, lr: float, decay: float, tmp_path: Path
) -> None:
    run = by_factory(tmp_path, **stem)
    optimizer = run.create_optimizer()
    group = group_of_the_stem(run)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert (group["lr"], group["weight_decay"]) == (lr, decay)
    assert [p is run.model.get_parameter(STEM) for p in group["params"]] == [True]
    everything = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in run.model.parameters())


def test_sgd_on_the_stem_and_adamw_elsewhere_is_the_plain_loop(tmp_path: Path) -> None:
    run = by_factory(tmp_path, stem_optimizer="sgd", stem_lr=0.5)
    run.train()
    model = zoo.build("ViT")
    stem = model.get_parameter(STEM)
    decayed = Trainer.get_decay_parameter_names(None, model)
    named = [(n, p) for n, p in model.named_parameters() if n != STEM]
    optimizers = [
        torch.optim.AdamW([p for n, p in named if n in decayed], LR, weight_decay=0.1),
        torch.optim.AdamW([p for n, p in named if n not in decayed], LR, weight_decay=0.0),
        torch.optim.SGD([stem], 0.5, momentum=0.9, weight_decay=0.1),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / trainers.STEPS)
        for o in optimizers
    ]
    for step in range(trainers.STEPS):
        images, labels = trainers.batch(step)
        model.zero_grad()
        model(pixel_values=images, labels=labels).loss.backward()
        rows = layer_rows(model.get_submodule(LAYER), images)
        stem.grad = closed_form(stem.grad, rows, 0.1).float()
        for part in (*optimizers, *schedules):
            part.step()
    for name, weight in weights(model).items():
        if "k_proj.bias" not in name:  # its gradient is 0 but for rounding, which Adam blows up
            assert relative_error(weights(run.model)[name], weight) < 1e-4, name


def test_the_scheduler_scales_the_stems_learning_rate_as_the_others(tmp_path: Path) -> None:
    schedule = {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 1}
    for stem in ({"stem_lr": 0.5}, {"stem_lr": 0.5, "stem_optimizer": "sgd"}):
        run = by_factory(tmp_path, schedule, **stem)
        run.train()
        others = run.optimizer.param_groups[0]["lr"]
        assert group_of_the_stem(run)["lr"] / 0.5 == pytest.approx(others / LR)
        assert 0 < others < LR


def test_a_frozen_stem_has_no_settings(tmp_path: Path) -> None:
    run = by_factory(tmp_path, stem_lr=0.5)
    run.model.get_parameter(STEM).requires_grad_(False)
    with pytest.raises(tract_hub.TractError, match="frozen"):
        run.train()


class Problem:
    """Two weights, and what is the same for one optimizer and two."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.stem, self.rest = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4))
        self.inner = [torch.optim.AdamW([self.rest], 0.1), torch.optim.SGD([self.stem], 0.2, 0.9)]
        self.both = TwoOptimizers(*self.inner)

    def loss(self) -> Tensor:
        return self.stem.square().sum() + self.rest.square().sum()

    def step(self, times: int = 1) -> list[Tensor]:
        for _ in range(times):
            self.both.zero_grad()
            self.loss().backward()
            self.both.step()
        return [self.rest.detach().clone(), self.stem.detach().clone()]


def test_two_optimizers_step_as_each_alone() -> None:
    got = Problem().step(3)
    expected = Problem()
    for _ in range(3):
        for optimizer in expected.inner:
            optimizer.zero_grad()
        expected.loss().backward()
        for optimizer in expected.inner:
            optimizer.step()
    assert torch.equal(got[0], expected.rest) and torch.equal(got[1], expected.stem)


@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy", "pickle"])
def test_two_optimizers_go_on_from_a_copy_of_their_state(how: str, tmp_path: Path) -> None:
    first, second = Problem(), Problem()
    first.step(2)
    if how in ("state_dict", "file"):
        state = copy.deepcopy(first.both.state_dict())
        if how == "file":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        for ours, theirs in ((second.rest, first.rest), (second.stem, first.stem)):
            ours.data.copy_(theirs.data)
        second.both.load_state_dict(state)
        assert [sorted(s) for s in second.both.state.values()] == [
            ["exp_avg", "exp_avg_sq", "step"],
            ["momentum_buffer"],
        ]
    else:
        copied = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
        assert copied.both.param_groups[0]["params"][0] is copied.rest
        second = copied
    for got, expected in zip(second.step(2), first.step(2), strict=True):
        assert torch.equal(got, expected)


def test_two_optimizers_lay_their_state_out_as_one() -> None:
    problem = Problem()
    problem.step()
    one = torch.optim.AdamW([{"params": [problem.rest]}, {"params": [problem.stem]}])
    problem.loss().backward()
    one.step()
    got, expected = problem.both.state_dict(), one.state_dict()
    assert got["state"].keys() == expected["state"].keys()
    assert [g["params"] for g in got["param_groups"]] == [
        g["params"] for g in expected["param_groups"]
    ]


def test_two_optimizers_are_scaled_as_one() -> None:
    problem, plain = Problem(), Problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for overflow in (False, True, False):
        problem.both.zero_grad()
        before = [p.detach().clone() for p in (problem.rest, problem.stem)]
        scaler.scale(problem.loss() * (float("inf") if overflow else 1.0)).backward()
        scaler.step(problem.both)
        scaler.update()
        after = (problem.rest, problem.stem)
        moved = [not torch.equal(b, a) for b, a in zip(before, after, strict=True)]
        assert moved == [not overflow] * 2
    expected = plain.step(2)
    assert relative_error(problem.rest.detach(), expected[0]) < 1e-6
    assert relative_error(problem.stem.detach(), expected[1]) < 1e-6


def test_two_optimizers_take_a_closure_and_further_parameters() -> None:
    problem, calls = Problem(), []
    more = nn.Parameter(torch.ones(2))
    problem.both.add_param_group({"params": [more], "lr": 0.3})

    def closure() -> Tensor:
        calls.append(1)
        problem.both.zero_grad()
        loss = problem.loss() + more.sum()
        loss.backward()
        return loss

    before = problem.step(0)
    assert problem.both.step(closure).item() > 0 and len(calls) == 1
    assert not torch.equal(more, torch.ones(2))
    assert not torch.equal(problem.stem, before[1]) and not torch.equal(problem.rest, before[0])
