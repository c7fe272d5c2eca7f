"""Hooks on a live module that gate its weight wherever its forward uses it.

The module keeps its class, its parameters and its forward. While its forward runs, a
``TorchFunctionMode`` reads the calls of torch functions; at the call of a linear operation whose
weight is the stem's parameter, or was derived from it, the weight passes through the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from tract_hub.errors import TractError
from tract_hub.method import engine
from tract_hub.method.compiled import calls_operators, check_compiler, correct_compiled
from tract_hub.method.forwards import ForwardUses, PerThread
from tract_hub.method.gate import Correction, correct_forward, gate_weight, notice
from tract_hub.method.gram.matrix import gram_of
from tract_hub.method.gram.precision import is_transformed
from tract_hub.method.hooks import (
    is_tracing,
    leave_graph,
    prepend_pre_hook,
    remove_hook,
    runs_already,
)
from tract_hub.method.operations import (
    LinearCall,
    as_cast,
    function_around,
    read_call,
    thinned,
    with_weight,
)
from tract_hub.method.step.step import Step


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
        self._thread = PerThread()

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
        if is_tracing():
            return
        if self._thread.here.modes and (torch.compiler.is_compiling() or not runs_already(module)):
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
            mode.__exit__(None, None, None)
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
        for interrupted in reversed(modes):
            interrupted.live = False
            if not torch.compiler.is_compiling() and _get_current_function_mode() is interrupted:
                interrupted.__exit__(None, None, None)
            if not torch.compiler.is_compiling() and interrupted in self._running:
                self._running.remove(interrupted)
        modes.clear()


class _Forwards(list["_GatedForward"]):
    """Those that run now, in all threads; a copy of the model has none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forwards, ()


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
            self.gate.forward_uses.meet(self._replayed_with())
            args, kwargs = with_weight(self._gated(call), args, kwargs)
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if any(map(self._is_weight, _tensors(args, kwargs))):
            written = args[:1] if func is Tensor.__setitem__ else (output,)
            self.derived.extend(_tensors(written, {}))
        return output

    def _replayed_with(self) -> Sequence[nn.Module] | None:
        """Return the modules that an autograd function runs here, to run them in its backward.

        Raises:
            TractError: it does not run this one, whose gate it will not see then.

        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.module.training:
            return None
        if not any(known is not None and known.requires_grad for known in self._parameters()):
            return None
        found = function_around()
        if found is None:
            return None
        name, modules = found
        if self.module not in modules:
            raise TractError(
                f"{self.gate.forward_uses.weight_name!r} is applied in {name}, an autograd "
                "function with a backward of its own, where TrAct does not see its gradient; a "
                "checkpoint may be put around the whole module that applies it"
            )
        return modules

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
        leave_graph()
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
        if call.name != self.gate.operation or self._is_weight(call.input):
            return False
        return self._is_weight(call.weight) or self._is_made_of_weight(call.weight)

    def _is_weight(self, tensor: Any) -> bool:
        return any(tensor is known for known in (*self._parameters(), *self.derived))

    def _is_made_of_weight(self, tensor: Tensor) -> bool:
        """Tell a weight that no torch function seen here has made: scripted, or cached."""
        if torch.compiler.is_compiling() or tensor.grad_fn is None:
            return False
        parameters = (known for known in self._parameters() if known is not None)
        return any(engine.is_made_of(tensor, known) for known in parameters)

    def _parameters(self) -> Iterable[Tensor | None]:
        return (lookup(self.module, name) for name in self.gate.parameters)


def _takes_gradient(weight: Tensor) -> bool:
    """Whether a gradient will come; under vmap, the weight itself does not say so."""
    if weight.requires_grad or torch.compiler.is_compiling():
        return weight.requires_grad
    return is_transformed(weight)


def lookup(module: nn.Module, name: str) -> Tensor | None:
    """Return the tensor that stands under a parameter's name now.

    Sharding and pruning put others in its place; None where a norm was removed with its parameter.
    """
    *path, last = name.split(".")
    holder: nn.Module | None = module
    for part in path:
        holder = None if holder is None else holder._modules.get(part)
    if holder is None:
        return None
    found = holder._parameters.get(last)
    return holder.__dict__.get(last) if found is None else found


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))
