"""Hooks on a live module that gate its weight wherever its forward uses it.

The module keeps its class, its parameters and its forward. While its forward runs, a
``TorchFunctionMode`` reads the calls of torch functions; at the call of a linear operation whose
weight is the stem's parameter, or was derived from it, the weight passes through the gate.
"""

from __future__ import annotations

import itertools
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tract_hub.errors import TractError, TractWarning
from tract_hub.method.compiled import calls_operators, check_compiler, correct_compiled
from tract_hub.method.gate import Correction, correct_forward, gate_weight, notice, warn_of_eval
from tract_hub.method.gram import Gram, gram_of
from tract_hub.method.hooks import (
    let_the_compiler_see_hooks,
    prepend_pre_hook,
    remove_hook,
)
from tract_hub.method.operations import (
    LinearCall,
    as_cast,
    read_call,
    thinned,
    with_weight,
)
from tract_hub.method.precision import is_transformed
from tract_hub.method.step import Step


class WeightGate:
    """The gate of one weight in the forward of one module; attached to it by two hooks.

    Args:
        operation: the torch function that applies it: ``"conv2d"``, ``"linear"``, …
        parameters: the parameters that the weight is made of, as dotted names below the module
            (``"weight"``; two for a weight norm).
        lam: the damping λ.
        forward_uses: shared by all gates of the same weight.
        step: shared by all gates of the model, where the rows of a step are summed; None where
            each forward stands for itself.
        rows: the share of the images that the Gram matrix is estimated from.

    """

    def __init__(
        self,
        operation: str,
        parameters: tuple[str, ...],
        lam: float,
        forward_uses: ForwardUses,
        step: Step | None = None,
        rows: float = 1.0,
    ) -> None:
        self.operation = operation
        self.parameters = parameters
        self.lam = lam
        self.forward_uses = forward_uses
        self.step = step
        self.rows = rows
        self._attached = True
        self._running = _Forwards()
        self._thread = _Thread()

    def attach(self, module: nn.Module) -> None:
        """Put the hooks on a module, around every other hook that it has."""
        # In this order: a forward in another thread must not enter what it will not leave.
        module.register_forward_hook(self.leave, always_call=True)
        prepend_pre_hook(module, self.enter)

    def detach(self, module: nn.Module) -> None:
        """Take them off. A forward that runs in another thread ends as it began, and then all."""
        self._attached = False
        self._drop_interrupted()
        remove_hook(module._forward_pre_hooks, self)
        if not self._running:
            self._remove_leave(module)

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Start reading the torch functions that the module's forward calls."""
        if _is_tracing():
            return
        self._drop_interrupted()
        mode = _GatedForward(self, module)
        if not torch.compiler.is_compiling():
            self._running.append(mode)
            if not self._attached:  # another thread has just detached it
                self._end(mode, module)
                return
        self._thread.here.modes.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Stop reading; also called when the forward raised."""
        modes = self._thread.here.modes
        if modes:
            mode = modes.pop()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if not torch.compiler.is_compiling():
                self._end(mode, module)

    def _end(self, mode: _GatedForward, module: nn.Module) -> None:
        if mode in self._running:
            self._running.remove(mode)
        if not self._attached and not self._running:
            self._remove_leave(module)

    def _remove_leave(self, module: nn.Module) -> None:
        for key in remove_hook(module._forward_hooks, self):
            module._forward_hooks_always_called.pop(key, None)

    def _drop_interrupted(self) -> None:
        """Ctrl-C in a forward skips the hook that leaves it."""
        modes = self._thread.here.modes
        for interrupted in modes:
            interrupted.live = False
            if not torch.compiler.is_compiling() and interrupted in self._running:
                self._running.remove(interrupted)
        modes.clear()


class _Forwards(list["_GatedForward"]):
    """Those that run now, in all threads; a copy of the model has none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forwards, ()


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
        self._thread = _Thread()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._process != _PROCESS:
            self.site, self._process = f"{next(_sites)} {self.weight_name}", _PROCESS

    def open(self) -> None:
        """Begin a forward. Outside of one, each use stands alone."""
        self._thread.here.uses = []
        self._thread.here.applied = False
        self._thread.here.compiled = False

    def close(self) -> bool:
        """End it: from here on, only its graph knows the uses. Say whether it missed the weight."""
        opened = self._thread.here.uses is not None  # not where TrAct was enabled half-way
        self._thread.here.uses = None
        return opened and not self._thread.here.applied

    def report_untreated(self) -> None:
        """Say, once, that a gradient went by which no forward in training mode had prepared."""
        if not self.untreated:
            self.untreated = True
            warn_of_eval(self.weight_name)

    def meet(self) -> None:
        """Note that the weight is applied, with or without a gradient."""
        self._thread.here.applied = True

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


class _Here:
    """What goes on in one thread."""

    def __init__(self) -> None:
        self.modes: list[_GatedForward] = []  # of one gate, entered and not left
        self.uses: list[Any] | None = None  # of one weight, in an open forward
        self.applied = False  # that weight, in that forward
        self.compiled = False  # that use


class _Thread(threading.local):
    """Gives each thread its own, and a copy of the model a new one."""

    def __init__(self) -> None:
        self.here = _Here()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Thread, ()


class ForwardScope:
    """Tells the gates of a model where one forward begins and ends."""

    def __init__(self, forward_uses: Iterable[ForwardUses], step: Step | None = None) -> None:
        self.forward_uses = tuple(forward_uses)
        self.step = step

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        let_the_compiler_see_hooks()  # perhaps in another process than that of enable

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on the model, outside those of its gates."""
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
            uses.open()
        if self.step is not None and not _is_tracing():
            _leave_graph()
            self.step.enter()

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Let go of them: from here on only the graph of this forward knows them."""
        if self.step is not None and not _is_tracing():
            self.step.leave(output)
        missed = [uses for uses in self.forward_uses if uses.close()]
        trains = module.training and torch.is_grad_enabled()
        if output is not None and trains and not torch.compiler.is_compiling():
            for uses in missed:  # no output: the forward raised
                _report_miss(uses)


def _report_miss(uses: ForwardUses) -> None:
    if not uses.missed:
        uses.missed = True
        warnings.warn(
            f"TrAct is on {uses.weight_name!r}, but a forward did not apply it where it was found: "
            "pass example_inputs=… such as that forward takes, or leave TrAct off",
            TractWarning,
            stacklevel=3,
        )


class _GatedForward(TorchFunctionMode):
    """Reads the torch functions called by one forward of one module."""

    def __init__(self, gate: WeightGate, module: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.module = module
        self.live = True
        self.derived: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.live:
            return func(*args, **kwargs)
        call = read_call(func, args, kwargs)
        if call is not None and self._applies(call):
            self.gate.forward_uses.meet()
            args, kwargs = with_weight(self._gated(call), args, kwargs)
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if isinstance(output, Tensor) and any(map(self._is_weight, _tensors(args, kwargs))):
            self.derived.append(output)
        return output

    def _gated(self, call: LinearCall) -> Tensor:
        if torch.is_grad_enabled() and self.module.training:
            check_compiler()
        if not torch.is_grad_enabled() or not _takes_gradient(call.weight):
            return call.weight
        if not self.module.training:
            uses = self.gate.forward_uses
            silent = uses.untreated or torch.compiler.is_compiling()
            return call.weight if silent else notice(call.weight, uses.report_untreated)
        with torch._C.DisableTorchFunction():  # the gates of outer modules must not see this
            self.gate.forward_uses.gated = True
            return gate_weight(call, self._correction(thinned(as_cast(call), self.gate.rows)))

    def _correction(self, call: LinearCall) -> Correction:
        gate, uses = self.gate, self.gate.forward_uses
        if gate.step is None and uses.probe is None and calls_operators(call):
            uses.note(None)
            return partial(correct_compiled, call=call, lam=gate.lam, site=uses.site)
        gram = gram_of(call, gate.lam, uses.site)
        if gate.step is None:
            return partial(
                correct_forward,
                gram=gram,
                lam=gate.lam,
                uses=uses.note(gram),
                probe=uses.probe,
            )
        _leave_graph()
        return partial(
            gate.step.gate,
            gram=gram,
            lam=gate.lam,
            name=uses.weight_name,
            module=self.module,
            probe=uses.probe,
        )

    def _applies(self, call: LinearCall) -> bool:
        """Tell the layer itself from a product that is a step in computing its weight."""
        named = call.name == self.gate.operation
        return named and self._is_weight(call.weight) and not self._is_weight(call.input)

    def _is_weight(self, tensor: Any) -> bool:
        parameters = (_lookup(self.module, name) for name in self.gate.parameters)
        return any(tensor is known for known in (*parameters, *self.derived))


def _takes_gradient(weight: Tensor) -> bool:
    """Whether a gradient will come; under vmap, the weight itself does not say so."""
    if weight.requires_grad or torch.compiler.is_compiling():
        return weight.requires_grad
    return is_transformed(weight)


def _lookup(module: nn.Module, name: str) -> Tensor | None:
    """The tensor that stands under a parameter's name now: sharding puts others in its place."""
    *path, last = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    found = module._parameters.get(last)
    return module.__dict__.get(last) if found is None else found


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))


def _leave_graph() -> None:
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            "TrAct sums the rows of a step outside of compiled graphs: compile without fullgraph, "
            "compile other parts of the model, or pass scope='rank'"
        )


def _is_tracing() -> bool:
    """Whether a graph is being recorded for inference: it must be the ordinary model's."""
    return (
        torch._C._get_tracing_state() is not None
        or torch.compiler._is_exporting_flag  # torch 2.11 compiles is_exporting() to True
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
    )
