"""Find the model that a running script trains, and give it TrAct before its first forward.

What is trained is what an optimizer holds. So the outermost module that is called in training
mode, on inputs that no graph made, with parameters that an optimizer holds, is the model, whoever
built it and whatever wraps it; its first layers are found with the inputs of that very call. A
teacher, a copy that averages weights and a head on another model's features are not.

Calls are watched from the making of an optimizer until every optimizer has made a step. Models
trained side by side meet in that time, and one has to be chosen by name; those trained one after
the other do not, and each gets TrAct.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook as after_steps
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_steps

from tract_hub.locator.locate import locate
from tract_hub.locator.unwrap import unwrap
from tract_hub.config import TractConfig
from tract_hub.errors import ExampleInputError, StemNotFoundError, TractError
from tract_hub.integrations.scripts.calls import fresh_inputs, named_inputs, names_in_callers
from tract_hub.integrations.scripts.optimizers import Optimizers, has_gradients
from tract_hub.method.forwards import ForwardUses
from tract_hub.names import did_you_mean
from tract_hub.stem import Stem
from tract_hub.surgery import StemStatus, enable, status, stem_parameters


@dataclass
class Trained:
    """A model that got TrAct.

    Attributes:
        name: what the script calls it, and its class.
        stems: its first layers, with their λ.
        uses: of these layers.
        optimizers: those that hold their weights.
        steps: steps made by these optimizers.
        used: those of the steps before which a forward applied TrAct.

    """

    name: str
    stems: tuple[StemStatus, ...]
    uses: tuple[ForwardUses, ...]
    optimizers: weakref.WeakSet[Optimizer]
    steps: int = 0
    used: int = 0

    def count(self, optimizer: Optimizer) -> None:
        """Count a step."""
        if optimizer in self.optimizers:
            self.steps += 1
            self.used += any(uses.gated for uses in self.uses)
            for uses in self.uses:
                uses.gated = False


@dataclass
class _Phase:
    """What was seen since an optimizer was made."""

    enabled: list[str] = field(default_factory=list)
    refused: list[TractError] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    other_names: set[str] = field(default_factory=set)


class Watch:
    """Gives TrAct to the model that the code inside ``with Watch(…)`` trains.

    Args:
        config: λ and scope.
        name: which model, where several are trained: its variable in the script, its class, or
            the path of a module inside it.
        asked: the settings that a script's own ``enable`` must agree with; else its own stand.

    Attributes:
        trained: the models that got TrAct.
        failure: why the run was ended.

    """

    def __init__(
        self, config: TractConfig, name: str | None = None, asked: Sequence[str] = ()
    ) -> None:
        self.config = config
        self.name = name
        self.asked = asked
        self.trained: list[Trained] = []
        self.failure: TractError | None = None
        self._optimizers = Optimizers(self._arm)
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._phase = _Phase()
        self._call = nn.Module.__call__
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        self._stack.callback(self._optimizers.install())
        self._stack.callback(before_steps(self._before_step).remove)
        self._stack.callback(after_steps(self._after_step).remove)
        self._stack.callback(self._disarm)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def why_none(self) -> str:
        """Say why no model got TrAct."""
        if self._phase.refused:
            return str(self._phase.refused[0])
        if self._phase.other_names:
            hint = did_you_mean(str(self.name), self._phase.other_names)
            others = " and ".join(self._phase.others)
            return f"the script trains no model {self.name!r} but {others}: {hint}"
        if not self._optimizers.made:
            return (
                "the script made no torch optimizer in this process (processes that it starts "
                "itself are not seen: start them with torchrun or accelerate launch)"
            )
        return (
            "no module with parameters that an optimizer holds was called in training mode on "
            "images: call tract_hub.enable(model) in the script itself"
        )

    def _arm(self) -> None:
        nn.Module.__call__ = _watched(self, self._call)  # type: ignore[method-assign]

    def _disarm(self) -> bool:
        armed = nn.Module.__call__ is not self._call
        nn.Module.__call__ = self._call  # type: ignore[method-assign]
        return armed

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """End a run that would make a step without TrAct."""
        phase, waiting = self._phase, set(self._optimizers.waiting)
        if phase.enabled or not has_gradients(optimizer):
            return
        if phase.refused:
            raise self._failed(phase.refused[0])
        if waiting == {optimizer} and not self.trained:  # nothing more will be called before it
            raise self._failed(TractError(self.why_none()))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for model in self.trained:
            model.count(optimizer)
        waiting = self._optimizers.waiting
        if has_gradients(optimizer):  # some scripts make an empty step first
            waiting.discard(optimizer)
        if not waiting:
            self._disarm()
            self._phase = _Phase()

    def _meet(self, root: nn.Module, args: Any, kwargs: Any, caller: FrameType) -> None:
        """Look at a call of a module that no other call is around."""
        if not (root.training and torch.is_grad_enabled()) or root in self._known:
            return
        trained = self._optimizers.trained()
        if not any(id(parameter) in trained for parameter in root.parameters()):
            return
        if self.name is None and not fresh_inputs(args, kwargs):
            return
        self._known.update(root.modules())
        model = unwrap(root)[0]
        names = [*names_in_callers(model, caller), type(model).__name__]
        try:
            stems = self._stems(model, named_inputs(model, args, kwargs), names, trained)
            if stems:
                self._enable(model, stems, names)
        except (StemNotFoundError, ExampleInputError) as error:
            self._phase.refused.append(error)  # another model may be the one that sees
        except TractError as error:
            raise self._failed(error) from error

    def _stems(
        self, model: nn.Module, inputs: Any, names: list[str], trained: set[int]
    ) -> list[Stem]:
        """Return the first layers that are trained, and of the model that was asked for."""
        inside = [name for name, _ in model.named_modules() if name]
        if self.name is not None and self.name not in (*names, *inside):
            self._phase.others.append(_shown(names))
            self._phase.other_names.update((*names, *inside))
            return []
        found = _located(model, inputs)
        if self.name is not None and self.name not in names:
            found = [stem for stem in found if stem.weight_name.startswith(f"{self.name}.")]
        held = [stem for stem in found if _is_trained(model, stem, trained)]
        if not held:
            layers = " and ".join(stem.weight_name for stem in found)
            why = (
                f"{layers} reads the pixels, but is frozen or in no optimizer"
                if layers
                else f"no layer of {self.name} reads the pixels"
            )
            raise StemNotFoundError(f"{_shown(names)}: {why}")
        return held

    def _enable(self, model: nn.Module, stems: Sequence[Stem], names: list[str]) -> None:
        self._phase.enabled.append(_shown(names))
        if len(self._phase.enabled) > 1:
            both = " and ".join(self._phase.enabled)
            raise TractError(f"the script trains {both}: say which with --model")
        present = status(model)
        if present:
            self._refuse_disagreement(present[0], names)
        else:
            enable(model, self.config.lam, stems, self.config.scope)
        uses = stem_parameters(model)
        weights = [parameter for parameters in uses.values() for parameter in parameters]
        holders = [o for weight in weights for o in self._optimizers.of(weight)]
        self.trained.append(
            Trained(_shown(names), status(model), tuple(uses), weakref.WeakSet(holders))
        )

    def _refuse_disagreement(self, present: StemStatus, names: list[str]) -> None:
        """Refuse a script's own settings where others were asked for."""
        for option in self.asked:
            own, wanted = getattr(present, option), getattr(self.config, option)
            if own != wanted:
                raise TractError(
                    f"the script itself enabled TrAct on {_shown(names)} with {option}={own}, "
                    f"and --{option} says {wanted}: leave one of them out"
                )

    def _failed(self, error: TractError) -> TractError:
        self.failure = error
        return error


def _watched(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
    """Make a ``Module.__call__`` that shows outermost calls to the watch.

    Inside of one, the original is in place: torch.compile never traces the watch.
    """

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not watch._disarm():
            return original(module, *args, **kwargs)
        try:
            watch._meet(module, args, kwargs, sys._getframe(1))
            return original(module, *args, **kwargs)
        finally:
            if watch._optimizers.waiting:
                watch._arm()

    unseen: Callable[..., Any] = torch.compiler.disable(call, recursive=False)
    return unseen


def _located(model: nn.Module, inputs: Any) -> Sequence[Stem]:
    """Find first layers with the inputs at hand, or else with those that the zoo knows."""
    with torch.autocast("cpu", enabled=False):
        try:
            return locate(model, inputs)
        except ExampleInputError as error:
            try:
                return locate(model)
            except ExampleInputError:
                raise error from None


def _is_trained(model: nn.Module, stem: Stem, trained: set[int]) -> bool:
    weight = model.get_parameter(stem.weight_name)
    return weight.requires_grad and id(weight) in trained


def _shown(names: Sequence[str]) -> str:
    variables, cls = "/".join(names[:-1]), names[-1]
    return f"{variables} ({cls})" if variables else cls
