"""Follow the pixels through one forward of a model that computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from tract_hub.adapters.tracing import flow as rules
from tract_hub.adapters.tracing.flow import NOTHING, Flow, Kind, Tag
from tract_hub.adapters.tracing.meta_autocast import meta_autocast
from tract_hub.adapters.tracing.meta_values import keep_values, stand_in, stand_in_list
from tract_hub.adapters.tracing.mismatch import Mismatch, mismatch_of
from tract_hub.adapters.tracing.recurrence import run_first_step
from tract_hub.errors import ExampleInputError
from tract_hub.method.calls import LinearCall, read_call


@dataclass(frozen=True)
class Consumption:
    """One call of a layer that reads something which came from the pixels.

    Attributes:
        call: the call, with meta tensors; None where it is no operation that TrAct treats.
        operation: the operation's name.
        flow: how the pixels reached its input.
        parameters: names of the parameters that its weight is made of.
        modules: the modules whose forward was running, outermost first.
        derived: whether the weight is not the parameter itself.
        weight_flow: how the pixels reached the weight, where they did.
        function: the custom autograd function that makes the call, and the modules within it.

    """

    call: LinearCall | None
    operation: str
    flow: Flow
    parameters: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    derived: bool = False
    weight_flow: Flow | None = None
    function: tuple[str, list[nn.Module]] | None = None


@dataclass
class Trace:
    """All that one forward showed.

    Attributes:
        layers: consumptions of the pixels, and of what is no longer affine in them.
        elsewhere: the parameters of layers that were applied to anything but the pixels.
        ended: why the forward did not come to its end, if it did not.
        mismatch: the sizes that did not fit in the last call that failed.
        looked_up: the embedding in which a model that takes indices looked up the pixels.

    """

    layers: list[Consumption] = field(default_factory=list)
    elsewhere: set[str] = field(default_factory=set)
    ended: Exception | None = None
    mismatch: Mismatch | None = None
    looked_up: str | None = None

    def add(self, other: Trace) -> None:
        """Add what another call of the same model showed."""
        self.layers += other.layers
        self.elsewhere |= other.elsewhere
        self.ended = self.ended or other.ended
        self.mismatch = self.mismatch or other.mismatch
        self.looked_up = self.looked_up or other.looked_up

    def give_way_to(self, other: Trace) -> None:
        """Take another call's word for the first layers that it showed, and keep the others."""
        first = [layer for layer in other.layers if layer.flow.kind is Kind.PIXELS]
        shown = {name for layer in first for name in layer.parameters}
        self.layers = [*first, *(la for la in self.layers if shown.isdisjoint(la.parameters))]
        self.elsewhere |= other.elsewhere


def follow_pixels(
    skeleton: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    pixels: Iterable[Tensor],
    live: Iterable[Tensor] = (),
    method: str = "forward",
) -> Trace:
    """Run a skeleton once and record every layer that the pixels reach.

    Args:
        skeleton: a model on the meta device, see ``meta_skeleton``.
        args: positional inputs of its forward, on the meta device or small and real.
        kwargs: its named inputs.
        pixels: those of the inputs that are pixels.
        live: tensors that must not be touched; a forward that does is ended.
        method: what to call instead of the forward: a method, or a module inside, by its path.

    """
    trace = Trace()
    call = skeleton if method == "forward" else attrgetter(method)(skeleton)
    tags = _Tags()
    names: dict[int, str] = {}
    for name, parameter in skeleton.named_parameters():
        tags.put(parameter, Tag(parameters=frozenset([name])))
        names[id(parameter)] = name
    for tensor in pixels:
        tags.put(tensor, Tag(Flow(Kind.PIXELS)))
    running = _Running(skeleton)
    try:
        layers = _Layers(trace, tags, running.stack, names)
        with (
            torch.no_grad(),
            meta_autocast(),
            running,
            layers,
            _Operations(trace, tags, layers, live),
        ):
            call(*args, **kwargs)
    except Exception as error:
        trace.ended = error
    return trace


_FROM_DATA = frozenset((torch.tensor, torch.as_tensor))
"""Functions that make tensors of numbers."""


class _Tags:
    """Tags of tensors, by the storage that they share with their views."""

    def __init__(self) -> None:
        self._tags: dict[int, Tag] = {}
        self._alive: list[Tensor] = []  # a storage's address is used again once it is freed

    def get(self, tensor: Tensor) -> Tag:
        return self._tags.get(tensor.untyped_storage()._cdata, NOTHING)

    def put(self, tensor: Tensor, tag: Tag) -> None:
        key = tensor.untyped_storage()._cdata
        if tag != NOTHING or key in self._tags:
            self._tags[key] = tag
        self._alive.append(tensor)


class _Running:
    """The modules whose forward runs now, outermost first."""

    def __init__(self, skeleton: nn.Module) -> None:
        self.stack: list[nn.Module] = []
        self._skeleton = skeleton
        self._handles: list[Any] = []

    def __enter__(self) -> _Running:
        for module in self._skeleton.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            enter, leave = self._enter, self._leave
            self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.stack.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.stack and self.stack[-1] is module:
            self.stack.pop()


class _Layers(TorchFunctionMode):
    """Records the calls of layers, as torch functions with all their arguments."""

    def __init__(
        self, trace: Trace, tags: _Tags, stack: list[nn.Module], names: Mapping[int, str]
    ) -> None:
        super().__init__()
        self.trace = trace
        self.tags = tags
        self.stack = stack
        self.names = names
        self.recorded = False  # the operation that runs now is on record

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and args[0].is_meta:
            return stand_in_list(args[0])
        if func in _FROM_DATA:  # never seen as an operation; its numbers may be read back
            kwargs.pop("device", None)
        call = read_call(func, args, kwargs)
        weight = self.tags.get(call.weight) if call else NOTHING
        if call is not None and weight.parameters:
            self._record(call, self.tags.get(call.input), weight)
            self.recorded = True
        try:
            if func is F.embedding and args[0].is_floating_point():
                raise TypeError("embedding takes integers")  # torch 2.11 does not say so on meta
            return run_first_step(func, args, kwargs) or func(*args, **kwargs)
        except Exception:
            self.trace.mismatch = mismatch_of(func, args, kwargs, self._kind_of)
            self._note_lookup(func, *args)
            raise
        finally:
            self.recorded = False

    def _note_lookup(self, func: Callable[..., Any], *args: Any) -> None:
        if func is F.embedding and self._kind_of(args[0]) is Kind.PIXELS:
            self.trace.looked_up = self.names.get(id(args[1]), "a table")

    def _kind_of(self, tensor: Tensor) -> Kind | None:
        flow = self.tags.get(tensor).flow
        return flow.kind if flow else None

    def _record(self, call: LinearCall, input: Tag, weight: Tag) -> None:
        if input.parameters:  # part of computing a weight
            return
        if input.flow is None or input.flow.kind is Kind.FEATURES:
            self.trace.elsewhere.update(weight.parameters)
            return
        self.trace.layers.append(
            Consumption(
                call=call,
                operation=call.name,
                flow=input.flow,
                parameters=tuple(sorted(weight.parameters)),
                modules=tuple(self.stack),
                derived=id(call.weight) not in self.names,
                weight_flow=weight.flow,
                function=None,
            )
        )

    def unknown_layer(self, operation: str, flow: Flow, parameters: frozenset[str]) -> None:
        """Record a layer that is none of the functions TrAct treats."""
        if not self.recorded:
            names = tuple(sorted(parameters))
            consumption = Consumption(None, operation, flow, names, tuple(self.stack))
            self.trace.layers.append(consumption)


class _Operations(TorchDispatchMode):
    """Passes tags from the inputs of each aten operation to its outputs."""

    def __init__(self, trace: Trace, tags: _Tags, layers: _Layers, live: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = {id(tensor) for tensor in live}
        self.trace = trace
        self.tags = tags
        self.layers = layers

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors(args, kwargs))
        if not self.live.isdisjoint(map(id, given)):
            raise ExampleInputError("its forward holds on to the original of a copied module")
        tags = [self.tags.get(tensor) for tensor in given]
        if any(tensor.is_meta for tensor in given):
            meta_args, meta_kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
            output = stand_in(func, meta_args, meta_kwargs)
        else:
            output = func(*args, **keep_values(func, args, kwargs))
        if func._schema.is_mutable and isinstance(output, Tensor) and given:
            output = _written(args, kwargs)  # not its copy on the meta device
        if any(tag is not NOTHING for tag in tags):
            self._pass_on(_name(func), tags, given, output)
        return output

    def _pass_on(self, operation: str, tags: list[Tag], given: list[Tensor], output: Any) -> None:
        tag = rules.after(operation, tags)
        parameters = frozenset[str]().union(*(t.parameters for t in tags))
        reaches = [t.flow for t in tags if t.flow and t.flow.kind is not Kind.FEATURES]
        if reaches and parameters and operation in rules.LAYERS:
            self.layers.unknown_layer(operation, reaches[0], parameters)
        elif parameters and operation in rules.LAYERS and any(t.flow for t in tags):
            self.trace.elsewhere.update(parameters)
        for tensor in _tensors((output,), {}):
            self.tags.put(tensor, _of_kind(tensor, given, tag, operation))


def _of_kind(tensor: Tensor, given: list[Tensor], tag: Tag, operation: str) -> Tag:
    """Numbers cut down to integers, or compared, are no longer affine in the pixels."""
    cut = any(_is_fractional(t) for t in given) and not _is_fractional(tensor)
    if cut and tag.flow and tag.flow.kind is Kind.PIXELS:
        return Tag(Flow(Kind.NONLINEAR, (*tag.flow.path, operation)))
    return tag


def _is_fractional(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _name(func: Any) -> str:
    namespace, _, name = func._schema.name.partition("::")
    return str(name.removesuffix("_")) if namespace == "aten" else str(func._schema.name)


def _written(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs["out"] if isinstance(kwargs.get("out"), Tensor) else args[0]


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    leaves, _ = tree_flatten((args, kwargs))
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))
