"""The ways to train that are measured: ordinary, torch_tract, tract_hub."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

import tract_hub
from tract_hub.studies.bench.cases import Case, photographs

LAM = 0.1


@dataclass(frozen=True)
class Setup:
    """How steps are taken.

    Attributes:
        device: where.
        bf16: whether under autocast to bfloat16.
        compiled: whether the model is compiled.
        channels_last: whether model and images are.

    """

    device: torch.device
    bf16: bool = False
    compiled: bool = False
    channels_last: bool = False

    @property
    def steps(self) -> int:
        """Steps between two looks at the clock: training looks at a GPU now and then only."""
        return 5 if self.device.type == "cuda" else 1


def ordinary(model: nn.Module) -> nn.Module:
    """Return the model as it is."""
    return model


def with_torch_tract(model: nn.Module) -> nn.Module:
    """Put the authors' package, torch_tract from PyPI, on the stem that tract_hub finds.

    Raises:
        ModuleNotFoundError: it is not installed.

    """
    torch_tract = importlib.import_module("torch_tract")
    for stem in tract_hub.locate(model):
        parent, _, name = stem.module_name.rpartition(".")
        layer = torch_tract.TrAct(model.get_submodule(stem.module_name), LAM)
        setattr(model.get_submodule(parent), name, layer)
    return model


def with_tract_hub(model: nn.Module) -> nn.Module:
    """Enable tract_hub."""
    return tract_hub.enable(model, lam=LAM)


ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ordinary": ordinary,
    "torch_tract": with_torch_tract,
    "tract_hub": with_tract_hub,
}


def installed() -> list[str]:
    """Return the arms whose packages are here."""
    missing = importlib.util.find_spec("torch_tract") is None
    return [arm for arm in ARMS if arm != "torch_tract" or not missing]


class Stepper:
    """One arm's model, taking the same training step again and again.

    Args:
        case: the model and its batch.
        arm: what is done to it.
        setup: how to step.
        ordinary: the stepper of the ordinary arm, to step with its very weights and images: where
            others lie in memory, a step may take a percent more or less.

    """

    def __init__(self, case: Case, arm: str, setup: Setup, ordinary: Stepper | None = None) -> None:
        torch.manual_seed(0)
        self.setup = setup
        form = torch.channels_last if setup.channels_last else torch.contiguous_format
        model: nn.Module = _twin(ordinary.model) if ordinary else case.build().to(setup.device)
        self.model: nn.Module = ARMS[arm](model).to(memory_format=form)
        if setup.compiled:
            self.model.compile()
        self.images: Tensor = (
            ordinary.images
            if ordinary
            else photographs(case.size, case.batch).to(setup.device, memory_format=form)
        )
        self.labels = torch.arange(case.batch, device=setup.device) % 10

    def seconds(self) -> float:
        """Take steps, forward and backward, and return how long one took."""
        self.model.zero_grad()
        self._wait()
        began = time.perf_counter()
        for _ in range(self.setup.steps):
            self._step()
        self._wait()
        return (time.perf_counter() - began) / self.setup.steps

    def _step(self) -> None:
        self.model.zero_grad()
        with torch.autocast(self.setup.device.type, torch.bfloat16, enabled=self.setup.bf16):
            logits = self.model(self.images)
        nn.functional.cross_entropy(logits.float(), self.labels).backward()

    def _wait(self) -> None:
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize(self.setup.device)


def _twin(model: nn.Module) -> nn.Module:
    """Copy the modules of a model, but not its tensors."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
