"""The stand-in for the forward of a module that applies a first layer's weight.

A module keeps its class, its parameters and its hooks; only the *instance's* ``forward`` is
another, as accelerate and peft do it, so torch.compile guards it by default. While the module's own
forward runs, a ``TorchFunctionMode`` reads the calls of torch functions. At the call of a linear
operation whose weight is the stem's parameter, or was computed from it, the weight passes a gate.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import operator
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from tract_hub.config import Settings
from tract_hub.errors import TractError, TractWarning
from tract_hub.method.accumulate import Accumulator, join, leave
from tract_hub.method.calls import LinearCall, read_call, with_weight
from tract_hub.method.correct import in_transform
from tract_hub.method.gate import (
    GATES,
    AccumulatorGate,
    OutputGate,
    Use,
    gate_weight,
    suits_output_gate,
    use_of,
)

STANDARDISED = (0.1, 10.0)
"""Mean squares of an input for which λ, in units of the squared input, is what it is meant for."""


class StandIn:
    """What stands for a method of one module while TrAct is on, and runs the ordinary one.

    It looks like the ordinary one to ``inspect``, to torch.jit.script and to whoever wraps it.

    Args:
        module: the module.

    Attributes:
        method: name of the method.
        plain: name of the module's own method that does for it where there is no tract_hub.
        ordinary: what the instance had under that name before; None where it had nothing.
        active: False after ``detach``, where somebody else's wrapper may still hold it.

    """

    method = "forward"
    plain = "forward"
    tract_hub_forward = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.ordinary: Any = None
        self.active = True

    def attach(self) -> None:
        """Put it in the place of the instance's method."""
        self.ordinary = self.module.__dict__.get(self.method)
        self.module.__dict__[self.method] = self

    def detach(self) -> None:
        """Take it out of its module, and stop."""
        self.active = False
        self.remove_from(self.module)

    def remove_from(self, module: nn.Module) -> None:
        """Take it out, under whatever name others have kept it to call it from their own.

        A shallow copy, as ``copy.copy`` and learn2learn make it, has it from another module.
        """
        for name, value in list(module.__dict__.items()):
            if getattr(value, "__func__", value) is self:
                if name == self.method and self.ordinary is None:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = self._ordinary_method()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the ordinary method."""
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the method that this one stands for."""
        if args and args[0] is self.module:  # accelerate's unwrap_model binds a forward once more
            args = args[1:]
        if self.ordinary is not None:
            return self.ordinary(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def _ordinary_method(self) -> Any:
        if self.ordinary is not None:
            return self.ordinary
        return types.MethodType(getattr(type(self.module), self.method), self.module)

    def __getattr__(self, name: str) -> Any:
        # Name, code and globals are the ordinary forward's. Not so `__func__`: who takes the
        # function out of a method, as accelerate's autocast does, would leave this object out.
        if name in ("__func__", "__self__", "module", "ordinary"):
            raise AttributeError(name)
        method = self._ordinary_method()
        return method if name == "__wrapped__" else getattr(method, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin._restore(copy.deepcopy(self.module, memo), copy.deepcopy(self._state(), memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle such that the model loads without tract_hub too, with its ordinary forward.

        What runs when it is loaded is ``restore_stand_in(module, "forward", state)`` where somebody
        has imported tract_hub, and else ``getattr(module, "forward", state)``.
        """
        modules = _Later(getattr, _Later(importlib.import_module, "sys"), "modules")
        tract_hub = _Later(operator.methodcaller("get", "tract_hub"), modules)
        restore = _Later(getattr, tract_hub, "restore_stand_in", getattr)
        return restore, (self.module, self.plain, (type(self).__name__, self._state()))

    def _state(self) -> dict[str, Any]:
        """What a copy needs to know, beside its module."""
        return {"ordinary": self.ordinary, "active": self.active}

    def _restore(self, module: nn.Module, state: dict[str, Any]) -> None:
        self.__dict__.update(state, module=module)


class _Later:
    """A call that a pickle makes when it is loaded."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args

    def __call__(self, *args: Any) -> Any:
        """Call its result; pickle asks that it can be called."""
        return self.function(*self.args)(*args)


def restore_stand_in(module: nn.Module, name: str, state: tuple[str, dict[str, Any]]) -> StandIn:
    """Return the stand-in that a pickle holds for a module's method."""
    kinds: tuple[type[StandIn], ...] = (StemForward, StemRepr, ModelForward, ScriptedTwin)
    stand_in = object.__new__({kind.__name__: kind for kind in kinds}[state[0]])
    stand_in._restore(module, state[1])
    return stand_in


class StemForward(StandIn):
    """The stand-in of a module that applies a first layer's weight.

    Args:
        module: the module.
        parameters: names, below the module, of the parameters that the weight is made of.
        weight_name: name of the weight's parameter in the model.
        features: groups and features n of the Gram matrix.
        settings: λ, how it damps, whose rows count.
        first: the stand-in of another module that applies the same weight; it sums the rows of
            both where the scope is ``"global"``.

    Attributes:
        applied: whether a forward has applied TrAct.
        used: whether one has since somebody set this to False.

    """

    def __init__(
        self,
        module: nn.Module,
        parameters: tuple[str, ...],
        weight_name: str,
        features: tuple[int, int],
        settings: Settings,
        first: StemForward | None = None,
    ) -> None:
        super().__init__(module)
        self.parameters = parameters
        self.weight_name = weight_name
        self.features = features
        self.settings = settings
        self.first = first
        self._begin()

    def attach(self) -> None:
        """Put it in place, and watch the gradients of the weight."""
        super().attach()
        StemRepr(self.module).attach()
        self._watch()
        if self._accumulator is not None:
            self._accumulator.note_parameter()

    def detach(self) -> None:
        """Take it out."""
        super().detach()
        if self.accumulator is not None:
            leave(self.accumulator)
        for hook in self._watched.values():
            hook.remove()
        self._watched.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the ordinary forward; where it trains, with the gradient of TrAct."""
        if not self.active or not torch.is_grad_enabled() or _is_tracing():
            return self.run(args, kwargs)
        if any(isinstance(arg, torch.fx.Proxy) for arg in args):
            self._warn_once("fx", _INLINED.format(self.weight_name))
            return self.run(args, kwargs)
        if not torch.compiler.is_compiling():
            if any(is_private(weight) for weight in self.weights()):
                raise TractError(OPACUS)
            self._watch()
        if not self.module.training:
            self._note("bypassed")
            return self.run(args, kwargs)
        with _ReadCalls(self):
            return self.run(args, kwargs)

    def apply(self, func: Any, call: LinearCall, args: Any, kwargs: Any) -> Any:
        """Apply the layer with a weight whose gradient is that of TrAct.

        Args:
            func: the torch function that applies it.
            call: its call, read.
            args: its positional arguments.
            kwargs: its named arguments.

        """
        weight = call.weight
        if not torch.is_grad_enabled():  # in an autograd function with a backward of its own
            self._note("")
            return func(*args, **kwargs)
        if not (weight.requires_grad or in_transform()):
            return func(*args, **kwargs)
        self._refuse(call)
        # DisableTorchFunction: modes of outer modules must not take a gate for part of the weight.
        # There is no public way to leave all modes; those of a user see `func` itself below.
        with torch._C.DisableTorchFunction():
            use = use_of(call, self.settings, None if "scale" in self._warned else self._observe)
            transposed = call.name == "matmul"  # (n, out); its transpose is laid out as a Linear's
            laid_out = weight.mT if transposed else weight
            by_output = self.accumulator is None and suits_output_gate(call)
            if by_output:
                gated = weight.detach()
            elif self.accumulator is not None:
                gated = self._accumulate(laid_out, call, use, self.accumulator)
            else:
                gated = gate_weight(laid_out, call, use)
            if transposed and not by_output:
                gated = gated.mT
        self.used = self.applied = True
        self._note("applied")
        args, kwargs = with_weight(gated, args, kwargs)
        output = func(*args, **kwargs)
        if by_output:
            with torch._C.DisableTorchFunction():
                output = OutputGate.apply(output, laid_out, call.input, use)
        return output

    def weights(self) -> Iterator[Tensor]:
        """Yield what the weight is made of, as it is now.

        Sharding and pruning put other tensors in a parameter's place. Where a name is gone, as
        after a parametrization, all parameters of the module count.
        """
        for name in self.parameters:
            found = _lookup(self.module, name)
            if found is None:
                yield from self.module.parameters()
            else:
                yield found

    @property
    def accumulator(self) -> Accumulator | None:
        """What sums the rows of a step; None where the scope is ``"local"``."""
        return self._accumulator if self.first is None else self.first.accumulator

    @property
    def frozen(self) -> bool:
        """Whether the weight takes no gradient now."""
        return not any(weight.requires_grad for weight in self.weights())

    def _refuse(self, call: LinearCall) -> None:
        if call.input.device != call.weight.device:
            raise TractError(
                f"{self.weight_name!r} is on {call.weight.device}, its input on "
                f"{call.input.device}: {DATA_PARALLEL}"
            )
        if torch.compiler.is_compiling() and in_transform():
            raise TractError(
                "torch compiles torch.func transforms without TrAct's gradient: leave the "
                "transform out of torch.compile, or compile without fullgraph"
            )

    def _observe(self, mean_square: Tensor) -> None:
        """Look once at the input's scale, on which an absolute λ depends."""
        low, high = STANDARDISED
        seen = mean_square[mean_square.isfinite() & (mean_square > 0)]
        if self.settings.damping == "relative" or "scale" in self._warned or not len(seen):
            return
        if not bool(((seen < low) | (seen > high)).any()):
            self._warned.add("scale")
        else:
            self._warn_once(
                "scale",
                f"the input of {self.weight_name!r} has a mean square of "
                f"{float(seen.mean()):.3g}, and λ={self.settings.lam:g} is meant for about "
                "1: standardise the images, or pass damping='relative'",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, TractWarning, stacklevel=4)

    def _note(self, what: str) -> None:
        """Note what the last forward with gradients did, once for all modules of a weight."""
        (self if self.first is None else self.first)._last = what

    def _watch(self, weights: Iterable[Tensor] | None = None) -> None:
        """Have autograd say when the weight gets a gradient, to report one that passed TrAct by."""
        if self.first is not None:
            return
        for weight in self.weights() if weights is None else weights:
            # A hook's own reference tells whether its tensor lives; with one to the tensor itself,
            # torch.utils.swap_tensors would refuse it (what FSDP2 and torchao convert weights by).
            watched = self._watched.get(id(weight))
            if watched is not None and watched.hooks_dict_ref() is not None:
                continue
            if isinstance(weight, nn.Parameter) and weight.requires_grad and weight.is_leaf:
                # Weakly: autograd holds the hook where Python's collector does not see it.
                stem = weakref.ref(self)
                hook = weight.register_post_accumulate_grad_hook(lambda p, s=stem: _arrived(s(), p))
                self._watched[id(weight)] = hook

    def arrived(self, parameter: Tensor) -> None:
        """Look at a gradient that has just arrived in the parameter's ``.grad``."""
        if self.accumulator is not None:
            self.accumulator.note_gradient(parameter)
        if self._last == "bypassed":
            self._warn_once(
                "eval",
                f"TrAct left the gradient of {self.weight_name!r} as it was: the forward ran in "
                "eval mode. Call model.train() before a training step.",
            )
        elif not self._last and self._warned.isdisjoint(("fx", "replaced")):
            self._warn_once("rebuilt", _PASSED_BY.format(self.weight_name))

    def _begin(self) -> None:
        """Set what a copy does not share."""
        self.used = self.applied = False
        self._last = ""  # "applied", "bypassed", or nothing yet, see _note
        self._warned: set[str] = set()
        self._watched: dict[int, Any] = {}
        self._accumulator: Accumulator | None = None
        if self.settings.scope == "global":  # not as a decorator: it imports the whole compiler
            self._accumulate: Any = torch.compiler.disable(_accumulate, reason=_NOT_COMPILED)
        if self.settings.scope == "global" and self.first is None:
            self._accumulator = Accumulator(
                self.module, self.parameters[0], self.weight_name, self.features, self.settings
            )

    def _state(self) -> dict[str, Any]:
        # Of Python's own types alone: it is read where there is no tract_hub, too.
        return super()._state() | {
            "parameters": self.parameters,
            "weight_name": self.weight_name,
            "features": self.features,
            "settings": asdict(self.settings),
            "first": self.first,
            "weights": list(self.weights()),
        }

    def _restore(self, module: nn.Module, state: dict[str, Any]) -> None:
        weights = state.pop("weights")  # the module has none yet where it is being copied
        super()._restore(module, state | {"settings": Settings(**state["settings"])})
        self._begin()
        self._watch(weights)


class StemRepr(StandIn):
    """The stand-in of that module's ``extra_repr``: it says that TrAct is on."""

    method = plain = "extra_repr"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Add TrAct and its λ to what the module says of itself."""
        said = [self.run(args, kwargs)]
        stems = (stem for stem in stand_ins(self.module) if isinstance(stem, StemForward))
        said += (f"TrAct λ={stem.settings.lam:g}" for stem in stems)
        return ", ".join(part for part in said if part)


class ScriptedTwin(StandIn):
    """What torch.jit.script asks a module for: the ordinary one, of the same parameters.

    It reads the source of the instance's forward. And it puts what it gets in the place of what it
    asked, so each module above a stem is asked before it, and answers for all below.
    """

    method = "__prepare_scriptable__"
    plain = "to"  # without arguments, it returns the module itself

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return a copy without TrAct that shares parameters and buffers."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        twin = copy.deepcopy(self.module, {id(tensor): tensor for tensor in tensors})
        for module in twin.modules():
            for stand_in in list(stand_ins(module)):
                stand_in.detach()
        return twin


class ModelForward(StandIn):
    """The stand-in of the whole model: it notices layers that were replaced after ``enable``.

    Args:
        model: the model.
        stems: name of each module that applies a first layer → its stand-in.

    """

    def __init__(self, model: nn.Module, stems: dict[str, StemForward]) -> None:
        super().__init__(model)
        self.stems = stems
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the ordinary forward."""
        if self.active and not self._warned and self.module.training and torch.is_grad_enabled():
            for name, stem in self.stems.items():
                if not _holds(self.module, name, stem):
                    self._warned = True
                    stem._warned.add("replaced")
                    _warn_of_replacement(stem.weight_name)
        return self.run(args, kwargs)

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"stems": self.stems, "_warned": self._warned}


class _ReadCalls(TorchFunctionMode):
    """Reads the torch functions that a module's forward calls.

    It knows which tensors are weights, the stem's or computed from it, and which are constants,
    held by the module or made of nothing else. All others come from what the module was called on.
    """

    def __init__(self, stem: StemForward) -> None:
        super().__init__()
        self.stem = stem
        self.derived: list[Tensor] = []
        self.held = [*stem.module.parameters(), *stem.module.buffers()]
        self.constants = list(self.held)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        call = read_call(func, args, kwargs)
        if call is not None and self._applies(call):
            return self.stem.apply(func, call, args, kwargs)
        result = func(*args, **kwargs)
        given, made = list(_tensors((*args, *kwargs.values()))), list(_tensors((result,)))
        if all(self._is_weight(tensor) or _is_in(self.constants, tensor) for tensor in given):
            of_weight = any(self._is_weight(tensor) for tensor in given)
            (self.derived if of_weight else self.constants).extend(made)
        else:  # what the input is written into is no constant any more
            written = [tensor for tensor in made if _is_in(given, tensor)]
            written += given[:1] if func is Tensor.__setitem__ else []
            if written:
                written += [tensor._base for tensor in written if tensor._base is not None]
                self.derived = [t for t in self.derived if not _is_in(written, t)]
                self.constants = [t for t in self.constants if not _is_in(written, t)]
        return result

    def _applies(self, call: LinearCall) -> bool:
        """Tell the layer itself from a product that is a step in computing its weight."""
        # A graph that is compiled does not show that an input was written into a constant.
        fixed = self.held if torch.compiler.is_compiling() else self.constants
        if self._is_weight(call.input) or _is_in(fixed, call.input):
            return False
        return self._is_weight(call.weight) or self._is_computed_elsewhere(call.weight)

    def _is_weight(self, tensor: Tensor) -> bool:
        made = self.stem.module.__dict__.get("weight")  # by a pre-hook of weight_norm or pruning
        return _is_in((*self.stem.weights(), made, *self.derived), tensor)

    def _is_computed_elsewhere(self, tensor: Tensor) -> bool:
        """Tell a weight that no function seen here has made: scripted, or cached."""
        if torch.compiler.is_compiling():
            # It has no graph to ask, and shows no mode torch._weight_norm.
            return parametrize.is_parametrized(self.stem.module) and not isinstance(
                tensor, nn.Parameter
            )
        nodes = list(_nodes(tensor.grad_fn))
        if any(node.name() in GATES for node in nodes):
            return False  # it lies behind the layer
        leaves = [node.variable for node in nodes if hasattr(node, "variable")]
        return any(_is_in(leaves, weight) for weight in self.stem.weights())


def stand_ins(module: nn.Module) -> Iterator[StandIn]:
    """Yield what stands for methods of one module, outermost first; also below others' wrappers."""
    rest = list(module.__dict__.values())
    seen: set[int] = set()
    while rest:
        value = rest.pop(0)
        value = getattr(value, "__func__", value)
        if callable(value) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, StandIn):
                yield value
            rest = [*_wrapped(value), *rest]


def _wrapped(value: Any) -> list[Any]:
    """Return what a wrapper of a method may call: what it names, its function, its closure."""
    if isinstance(value, StandIn):
        return [value.ordinary]
    found = [value.__dict__.get("__wrapped__")] if hasattr(value, "__dict__") else []
    if isinstance(value, functools.partial):
        found.append(value.func)
    # A compiler cannot look into closures; it asks for stand-ins that are at their place alone.
    elif isinstance(value, types.FunctionType) and not torch.compiler.is_compiling():
        found += inspect.getclosurevars(value).nonlocals.values()
    return [each for each in found if not isinstance(each, nn.Module)]


def _accumulate(weight: Tensor, call: LinearCall, use: Use, accumulator: Accumulator) -> Tensor:
    """Return a weight whose backward counts the rows of the step."""
    if in_transform():
        raise TractError("scope='global' knows no torch.func transforms: pass scope='local'")
    if not call.weight.is_leaf:
        raise TractError(COMPUTED.format(accumulator.weight_name))
    accumulator.transposed = call.name == "matmul"
    join(accumulator)
    gated: Tensor = AccumulatorGate.apply(weight, call.input.detach(), use, accumulator)
    return gated


def is_private(weight: Tensor) -> bool:
    """Whether Opacus takes the gradients of a weight: in grad_sample, or by expanded weights."""
    return hasattr(weight, "grad_sample") or type(weight).__name__ == "ExpandedWeight"


def _arrived(stem: StemForward | None, parameter: Tensor) -> None:
    if stem is not None and stem.active:
        stem.arrived(parameter)


def _nodes(last: Any) -> Iterator[Any]:
    """Yield the nodes of autograd's graph from this one on."""
    rest = [last]
    seen = {None}
    while rest:
        node = rest.pop()
        if node not in seen:
            seen.add(node)
            yield node
            rest += (function for function, _ in node.next_functions)


def _is_in(tensors: Iterable[Tensor | None], tensor: Tensor) -> bool:
    return any(tensor is known for known in tensors)


def _holds(model: nn.Module, name: str, stem: StemForward) -> bool:
    """Whether the stem's module is still at its place, or it or a copy in a wrapper there."""
    found = model
    for part in name.split(".") if name else ():
        below = getattr(found, part, None)
        if not isinstance(below, nn.Module):  # perhaps in a wrapper of a module above
            break
        found = below
    # peft's modules_to_save trains a copy; its LoRA freezes the layer and trains another beside it.
    inside = (stand_in for module in found.modules() for stand_in in stand_ins(module))
    return found is stem.module or any(
        isinstance(each, StemForward) and each.weight_name == stem.weight_name and not each.frozen
        for each in inside
    )


def _warn_of_replacement(name: str) -> None:
    warnings.warn(
        f"the layer of {name!r} was replaced or wrapped after tract_hub.enable, and trains with "
        "the ordinary gradient: call tract_hub.enable(model) again",
        TractWarning,
        stacklevel=3,
    )


# Run while a graph is made, not in it. torch.compiler.assume_constant_result sets this and no more,
# but imports the whole compiler, which takes longer than all the rest of this package.
_warn_of_replacement._dynamo_marked_constant = True  # type: ignore[attr-defined]

OPACUS = (
    "Opacus steps with the gradient of each image, and TrAct corrects that of the batch: call "
    "tract_hub.disable(model) before it makes the model private"
)

DATA_PARALLEL = (
    "torch.nn.DataParallel copies a model without its forward: train with "
    "torch.nn.parallel.DistributedDataParallel"
)

COMPUTED = (
    "scope='global' corrects the gradient of a parameter, and {0!r} is computed from others "
    "(standardised, parametrized or flattened): pass scope='local'"
)

_NOT_COMPILED = (
    "TrAct sums the rows of a step outside of compiled graphs: compile without fullgraph, "
    "compile other parts of the model, or pass scope='local'"
)

_INLINED = (
    "torch.fx copies the forward of {0!r} without TrAct: call tract_hub.enable on the model that "
    "it makes, with stems=[…] if need be"
)

_PASSED_BY = (
    "{0!r} got a gradient that TrAct did not see: a tool has rebuilt the layer (as torch.fx and "
    "quantization do), or code applies its weight by itself. Call tract_hub.enable on the model "
    "after that tool"
)


def _is_tracing() -> bool:
    """Whether a graph is being recorded for inference: it must be the ordinary model's."""
    # torch.compiler.is_exporting() is constantly True in what torch 2.11 compiles.
    traces = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return bool(traces) or torch.compiler._is_exporting_flag


def _lookup(module: nn.Module, name: str) -> Tensor | None:
    """Return the tensor that stands under a parameter's name now, or None."""
    path, _, last = name.rpartition(".")
    try:
        holder = module.get_submodule(path)
    except AttributeError:
        return None
    # Not getattr(holder, last): a parametrized weight would be computed on being read.
    found = dict(holder.named_parameters(recurse=False, remove_duplicate=False)).get(last)
    return holder.__dict__.get(last) if found is None else found


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))
