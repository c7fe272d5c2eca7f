"""One forward of a model: where it begins and ends, and how it uses each weight, in each thread."""

from __future__ import annotations

import itertools
import threading
import uuid
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tract_hub.errors import TractError, TractWarning
from tract_hub.method.gate import warn_of_eval
from tract_hub.method.gram.matrix import Gram
from tract_hub.method.hooks import (
    is_tracing,
    leave_graph,
    let_the_compiler_see_hooks,
    prepend_pre_hook,
    remove_hook,
    runs_already,
)
from tract_hub.method.step.step import Step

_sites = itertools.count()
"""Numbers, not random names: a compiler that keeps graphs on disk knows them by what is in them."""

_PROCESS = uuid.uuid4()
"""In which those numbers hold."""


class ForwardUses:
    """The Gram matrices of one weight's uses in the forward that runs now, in each thread.

    Attributes:
        weight_name: the weight's name in the model.
        shape: groups and features n of its Gram matrices.
        site: what ``gram_of`` remembers the weight by; copies of the model share it.
        missed: whether a forward that did not apply the weight was reported.
        untreated: whether a gradient was reported that went by in eval mode.
        gated: whether a forward put the gate in place since this was last set to False.
        probe: set while the gradient is to be measured, see ``measure``.

    """

    def __init__(self, weight_name: str, shape: tuple[int, int]) -> None:
        self.weight_name = weight_name
        self.shape = shape
        self.site = f"{next(_sites)} {weight_name}"
        self._process = _PROCESS
        self.missed = False
        self.untreated = False
        self.gated = False
        self.probe: Tensor | None = None
        self._thread = PerThread()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._process != _PROCESS:
            self.site, self._process = f"{next(_sites)} {self.weight_name}", _PROCESS

    def open(self, model: nn.Module) -> None:
        """Begin a forward. Outside of one, each use stands alone."""
        here = self._thread.here
        if here.uses is not None and not torch.compiler.is_compiling() and runs_already(model):
            here.depth += 1  # the model calls itself: still one forward
            return
        here.uses, here.model, here.depth = [], model, 0
        here.applied, here.replayed, here.compiled = 0, False, False

    def close(self) -> bool:
        """End it: from here on, only its graph knows the uses. Say whether it missed the weight."""
        here = self._thread.here
        if here.depth > 0:
            here.depth -= 1
            return False
        opened = here.uses is not None  # not where TrAct was enabled half-way
        here.uses = here.model = None
        return opened and not here.applied

    def report_untreated(self) -> None:
        """Say, once, that a gradient went by which no forward in training mode had prepared."""
        if not self.untreated:
            self.untreated = True
            warn_of_eval(self.weight_name)

    def meet(self, replayed_with: Sequence[nn.Module] | None = None) -> None:
        """Note that the weight is applied, with or without a gradient.

        Args:
            replayed_with: the modules that an autograd function runs without a graph, to run them
                again in its backward, as reentrant checkpoints do; None where there is none.

        Raises:
            TractError: the forward has several uses, and some are made again, one by one.

        """
        here = self._thread.here
        here.applied += 1
        if here.uses is None:
            return
        here.replayed |= replayed_with is not None and here.model not in replayed_with
        if here.replayed and here.applied > 1:
            raise TractError(
                f"{self.weight_name!r} is used several times in one forward and recomputed by a "
                "reentrant checkpoint, which does not show them together: pass use_reentrant=False"
            )

    def note(self, gram: Gram | None) -> list[Gram]:
        """Add one use, None where it is compiled; return what all uses of this forward share."""
        uses = self._thread.here.uses
        if uses is None:
            return []
        compiling = torch.compiler.is_compiling()
        if uses and (compiling or self._thread.here.compiled):
            # A compiled backward is traced at once, when later uses are not known yet; and where
            # tracing ends at this error, what it has compiled before stays in use.
            raise TractError(
                f"{self.weight_name!r} is used several times in one forward, which cannot be "
                "compiled with TrAct: leave the part that uses it out of torch.compile, and "
                "compile those after it (model.blocks.compile())"
            )
        self._thread.here.compiled = compiling
        uses.append(gram)
        return [] if compiling else uses


class Here:
    """What goes on in one thread."""

    def __init__(self) -> None:
        self.modes: list[Any] = []  # of one gate, entered and not left
        self.uses: list[Any] | None = None  # of one weight, in an open forward
        self.model: nn.Module | None = None  # whose forward that is
        self.depth = 0  # how often that forward has called itself
        self.applied = 0  # how often that forward has applied the weight
        self.replayed = False  # whether an autograd function will do so again
        self.compiled = False  # that use


class PerThread(threading.local):
    """Gives each thread its own, and a copy of the model a new one."""

    def __init__(self) -> None:
        self.here = Here()

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, ()


class ForwardScope:
    """Tells the gates of a model where one forward begins and ends.

    Args:
        forward_uses: of each first layer.
        step: shared by all gates of the model, where the rows of a step are summed.
        parameters: the names of the parameters that the model had.

    """

    def __init__(
        self,
        forward_uses: Iterable[ForwardUses],
        step: Step | None = None,
        parameters: frozenset[str] = frozenset(),
    ) -> None:
        self.forward_uses = tuple(forward_uses)
        self.step = step
        self.parameters = parameters

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        let_the_compiler_see_hooks()  # perhaps in another process than that of enable

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on the model, outside those of its gates."""
        torch.compiler.assume_constant_result(warn_of_miss)  # run while a graph is made, not in it
        prepend_pre_hook(model, self.begin)
        model.register_forward_hook(self.end, always_call=True)

    def detach(self, model: nn.Module) -> None:
        """Take them off."""
        remove_hook(model._forward_pre_hooks, self)
        for key in remove_hook(model._forward_hooks, self):
            model._forward_hooks_always_called.pop(key, None)

    def begin(self, module: nn.Module, inputs: Any) -> None:
        """Start to collect uses."""
        for uses in self.forward_uses:
            uses.open(module)
        if self.step is not None and not is_tracing():
            leave_graph()
            self.step.enter()

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Let go of them: from here on only the graph of this forward knows them."""
        if self.step is not None and not is_tracing():
            self.step.leave(output)
        missed = [uses for uses in self.forward_uses if uses.close()]
        trains = module.training and torch.is_grad_enabled()
        if output is not None and trains and not is_tracing():
            for uses in missed:  # no output: the forward raised
                _report_miss(uses)


def _report_miss(uses: ForwardUses) -> None:
    if torch.compiler.is_compiling():
        warn_of_miss(uses.weight_name)
    elif not uses.missed:
        uses.missed = True
        warn_of_miss(uses.weight_name)


def warn_of_miss(name: str) -> None:
    """Warn that a forward did without a first layer; where it is compiled, while it is."""
    warnings.warn(
        f"TrAct is on {name!r}, but a forward did not apply it where it was found: "
        "pass example_inputs=… such as that forward takes, or leave TrAct off",
        TractWarning,
        stacklevel=4,
    )
