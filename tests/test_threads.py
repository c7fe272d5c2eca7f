"""Threads and processes: each forward is one model's, whatever another one does meanwhile."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import tract_hub
from tests.oracle import closed_form, layer_rows, relative_error

LAM = 0.1


class Stem(nn.Conv2d):
    """A layer that can be held up in the middle of its forward."""

    reached: threading.Event | None = None
    go_on: threading.Event | None = None

    def forward(self, x: Tensor) -> Tensor:
        held, self.reached = self.reached, None
        if held:
            held.set()
            self.go_on.wait(30)
        return super().forward(x)


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Stem(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]


def expected(x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The ordinary gradient, and TrAct's."""
    model = build(seed)
    ordinary = gradient(model, x)
    return ordinary, closed_form(ordinary, layer_rows(model[0], x), LAM)


def same(got: Tensor, wanted: Tensor) -> bool:
    return relative_error(got, wanted) < 1e-10


@contextmanager
def in_mid_forward(model: nn.Module, x: Tensor):
    """Run the body while another thread is in the stem's forward; yield what that will have found:
    its gradient, that of its next step, and how many function modes it was left with."""
    stem, found = model[0], {}
    stem.reached, stem.go_on = reached, go_on = threading.Event(), threading.Event()

    def work() -> None:
        found["this"] = gradient(model, x)
        found["next"] = gradient(model, x)
        found["modes"] = torch._C._len_torch_function_stack()

    thread = threading.Thread(target=work)
    thread.start()
    assert reached.wait(30)
    try:
        yield found
    finally:
        go_on.set()
        thread.join(30)


def is_ordinary(model: nn.Module) -> bool:
    return not any("forward" in module.__dict__ for module in model.modules())


def test_a_forward_ends_as_it_began_when_another_thread_disables(x: Tensor) -> None:
    ordinary, corrected = expected(x)
    model = tract_hub.enable(build(), LAM)
    with in_mid_forward(model, x) as found:
        tract_hub.disable(model)
        assert tract_hub.status(model) == ()
    assert same(found["this"], corrected)
    assert same(found["next"], ordinary)
    assert found["modes"] == 0
    assert is_ordinary(model)


def test_a_forward_ends_as_it_began_when_another_thread_enables(x: Tensor) -> None:
    ordinary, corrected = expected(x)
    model = build()
    with in_mid_forward(model, x) as found:
        tract_hub.enable(model, LAM, stems=["0"])
    assert same(found["this"], ordinary)
    assert same(found["next"], corrected)
    assert found["modes"] == 0


def test_a_copy_made_in_mid_forward_is_a_model_of_its_own(x: Tensor) -> None:
    model = tract_hub.enable(build(), LAM)
    with in_mid_forward(model, x):
        stem, model[0].go_on = model[0], None  # events cannot be copied
        twin = copy.deepcopy(model)
        stem.go_on = threading.Event()
        stem.go_on.set()
    assert same(gradient(twin, x), expected(x)[1])
    assert is_ordinary(tract_hub.disable(twin))


def test_disabling_after_an_interrupted_forward_leaves_nothing(x: Tensor) -> None:
    class Interrupted(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = tract_hub.enable(nn.Sequential(Interrupted(3, 4, 3)).double(), LAM, stems=["0"])
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert is_ordinary(tract_hub.disable(model))


def run_together(*works: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def kept(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=kept, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(interval)
    assert not failed, failed


@pytest.mark.parametrize("scope", ["local", "global"])
def test_two_models_trained_at_once_are_each_trained_as_alone(x: Tensor, scope: str) -> None:
    def train(seed: int) -> list[Tensor]:
        model = tract_hub.enable(models[seed], LAM, stems=["0"], scope=scope)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for _ in range(50):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    models = {seed: build(seed) for seed in (0, 1)}
    alone = {seed: [p.clone() for p in train(seed)] for seed in (0, 1)}
    models = {seed: build(seed) for seed in (0, 1)}
    together: dict[int, list[Tensor]] = {}
    run_together(
        lambda: together.update({0: train(0)}),
        lambda: together.update({1: train(1)}),
    )
    for seed, parameters in alone.items():
        for got, wanted in zip(together[seed], parameters, strict=True):
            assert same(got, wanted)


def test_one_model_in_two_threads_gives_each_its_own_rows() -> None:
    model = tract_hub.enable(build(), LAM)
    inputs = [torch.randn(n, 3, 8, 8, dtype=torch.double) for n in (2, 7)]
    wanted = [expected(part)[1] for part in inputs]
    odd: list[int] = []

    def work(which: int) -> None:
        for _ in range(50):
            if not same(gradient(model, inputs[which]), wanted[which]):
                odd.append(which)

    run_together(lambda: work(0), lambda: work(1))
    assert odd == []


def test_a_model_switched_on_and_off_all_the_time_is_always_one_or_the_other(x: Tensor) -> None:
    kinds, model = expected(x), build()
    seen: list[list[bool]] = []
    left = []
    done = threading.Event()

    def train() -> None:
        try:
            for _ in range(300):
                got = gradient(model, x)
                seen.append([same(got, kind) for kind in kinds])
            left.append(torch._C._len_torch_function_stack())
        finally:
            done.set()

    def switch() -> None:
        while not done.is_set():
            tract_hub.enable(model, LAM, stems=["0"])
            tract_hub.disable(model)

    run_together(train, switch)  # a TractWarning in a forward would be an error
    assert all(sum(kind) == 1 for kind in seen) and len(seen) == 300
    assert left == [0]
    assert is_ordinary(model)


def test_two_searches_at_once_leave_torch_as_it_was() -> None:
    before = torch.amp.autocast.__init__

    def search() -> None:
        for _ in range(20):
            tract_hub.locate(build())

    run_together(search, search)
    assert torch.amp.autocast.__init__ is before


class Features(Dataset):
    """Images as an enabled model sees them: workers get a copy of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(index)).double()
        gradients = gradient(self.model, x)
        return x, gradients, len(tract_hub.status(self.model))


def _with_workers(rank: int, start: str) -> None:
    model = tract_hub.enable(build(), LAM)
    loader = DataLoader(Features(model), None, num_workers=1, multiprocessing_context=start)
    for x, gradients, stems in loader:
        assert stems == 1
        assert same(gradients, expected(x)[1])
        assert same(gradient(model, x), gradients)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers_that_hold_an_enabled_model(start: str) -> None:
    # In a process of its own: torch refuses to differentiate in a fork of a process that has once
    # differentiated in a thread of the engine's, which other tests of this process may have done.
    torch.multiprocessing.spawn(_with_workers, (start,), nprocs=1)


def _child(rank: int, model: nn.Module, x: Tensor, out: Tensor) -> None:
    out.copy_(gradient(model, x))
    model.zero_grad()


def test_an_enabled_model_given_to_a_spawned_process(x: Tensor) -> None:
    model = tract_hub.enable(build(), LAM)
    out = torch.zeros(model[0].weight.shape, dtype=torch.double).share_memory_()
    torch.multiprocessing.spawn(_child, (model, x, out), nprocs=1)
    assert same(out, expected(x)[1])
    assert same(gradient(model, x), out)


def count(steps: int, step: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        for _ in range(steps):
            warnings.simplefilter("always")  # also forgets what was shown
            step()
    return [str(warning.message) for warning in caught]


def test_training_in_eval_mode_is_reported_once(x: Tensor) -> None:
    model = tract_hub.enable(build(), LAM).eval()
    (message,) = count(200, lambda: model(x).sum().backward())
    assert "eval mode" in message and "model.train()" in message


@pytest.mark.parametrize("scope", ["local", "global"])
def test_ordinary_training_is_silent(x: Tensor, scope: str) -> None:
    model = tract_hub.enable(build(), LAM, scope=scope)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    assert count(200, step) == []
