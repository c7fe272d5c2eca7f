"""2,000 steps with all that may happen in between: the same weights, and no more memory."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import tract_hub

STEPS, WARM_UP = 2_000, 500


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    )


class Training:
    """A model with momentum and a schedule; λ changes with the step."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.step = 0
        self.renew(build())

    def renew(self, model: nn.Sequential) -> None:
        self.model = tract_hub.enable(model, self.lam, scope=self.scope)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)

    @property
    def lam(self) -> float:
        return (0.1, 0.2, 0.05)[self.step // 100 % 3]

    def advance(self) -> None:
        draw = torch.Generator().manual_seed(self.step)
        x, y = torch.randn(4, 3, 8, 8, generator=draw), torch.arange(4) % 2
        tract_hub.enable(self.model, self.lam, scope=self.scope)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1

    def resume(self, folder: Path) -> None:
        """Write all to disk, and go on from what is read into new objects."""
        save_model(self.model, str(folder / "model.safetensors"))
        parts = {"optimizer": self.optimizer, "schedule": self.schedule}
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state, folder / "state.pt")
        state = torch.load(folder / "state.pt", weights_only=True)
        model = build()
        load_model(model, str(folder / "model.safetensors"))
        self.renew(model)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def interrupt(self, folder: Path) -> None:
        """Do what must change nothing."""
        if self.step % 50 == 10:
            tract_hub.enable(tract_hub.disable(self.model), self.lam, scope=self.scope)
        if self.step % 50 == 20:
            self.average = copy.deepcopy(self.model)
            self.average.eval()(torch.zeros(1, 3, 8, 8))
        if self.step % 50 == 30:
            self.resume(folder)
        if self.step % 50 == 40:
            self.model = copy.deepcopy(self.model)
            before = self.optimizer.state_dict(), self.schedule.state_dict()
            self.renew(self.model)
            self.optimizer.load_state_dict(before[0])
            self.schedule.load_state_dict(before[1])


def held() -> tuple[int, int]:
    """Live tensors, and function modes."""
    gc.collect()
    tensors = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
    return tensors, torch._C._len_torch_function_stack()


def resident() -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.soak
@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_long_run_holds_no_more_and_ends_as_one_without_interruptions(
    scope: str, tmp_path: Path
) -> None:
    plain, disturbed = Training(scope), Training(scope)
    for step in range(STEPS):
        plain.advance()
        disturbed.interrupt(tmp_path)
        disturbed.advance()
        if step == WARM_UP:
            things, memory = held(), resident()
    after = resident()
    print(f"{scope}: {held()} held, {after - memory:+.1f} MiB since step {WARM_UP}")
    assert held() == things
    assert after - memory < 16
    for got, wanted in zip(
        disturbed.model.state_dict().values(), plain.model.state_dict().values(), strict=True
    ):
        assert torch.equal(got, wanted)
