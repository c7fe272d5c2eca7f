"""Follow the pixels through one forward of a model that computes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from operator import attrgetter
from types import MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from tract_hub.locator.draws import own_draws
from tract_hub.locator.graph import NOTHING, Flow, Graph, Kind, LayerCall
from tract_hub.locator.mismatch import Mismatch, mismatch_of
from tract_hub.locator.values import MetaAnswers, list_of, tensors_in
from tract_hub.locator.zoos.examples import Example, inputs_of
from tract_hub.method.calls import LinearCall, read_call


@dataclass
class Trace:
    """All that one forward showed.

    Its ``layers`` read the pixels, or what is no longer affine in them.
    """

    layers: list[LayerCall] = field(default_factory=list)
    ended: Exception | None = None  # why the forward did not come to its end, if it did not
    mismatch: Mismatch | None = None  # in the last call that failed
    looked_up: str | None = None  # the embedding that took the pixels for indices
    ran: set[str] = field(default_factory=set)  # modules whose forward was called
    dynamic: bool = False  # whether a convolution of the pixels had a weight made of the pixels

    def add(self, other: Trace) -> None:
        """Add what another call of the same model showed."""
        self.layers += other.layers
        self.ended = self.ended or other.ended
        self.mismatch = self.mismatch or other.mismatch
        self.looked_up = self.looked_up or other.looked_up
        self.ran |= other.ran
        self.dynamic = self.dynamic or other.dynamic


def follow_pixels(model: nn.Module, copied: nn.Module, example: Example) -> Trace:
    """Run the ``meta_copy`` of a model once and record every layer that the pixels reach."""
    trace = Trace()
    inputs = {id(tensor): name for *_, name, tensor in inputs_of(model, example)}
    leaves = {id(tensor): _leaf(tensor) for tensor in example.pixels}
    live = () if copied is model else (*model.parameters(), *model.buffers())
    parameters = dict(copied.named_parameters())  # holds those that scripted modules make up anew
    pixels = {id(leaf): Flow(Kind.PIXELS, (inputs.get(key, ""),)) for key, leaf in leaves.items()}
    weights = {id(p): Flow(parameters=frozenset([name])) for name, p in parameters.items()}
    graph = Graph(
        leaves=pixels | weights,
        trainable=frozenset(name for name, p in model.named_parameters() if p.requires_grad),
        layers=trace.layers,
    )
    call = copied if example.method == "forward" else attrgetter(example.method)(copied)
    try:
        with torch.inference_mode(False), torch.enable_grad(), own_draws(copied):
            # A forward may write into its input, which autograd allows in a copy of a leaf alone.
            copies = {key: leaf.clone() for key, leaf in leaves.items()}
            args, kwargs = tree_map_only(
                Tensor,
                lambda tensor: copies.get(id(tensor), tensor),
                (example.args, dict(example.kwargs)),
            )
            images = {id(copies[id(t)]) for t in example.pixels if t.dtype == torch.uint8}
            layers = _Layers(trace, graph, images)
            with layers.told_by(copied), layers, MetaAnswers(live):
                output = call(*args, **kwargs)
            for tensor in tensors_in(output):
                graph.flow(tensor)  # layers that nothing behind them showed
    except Exception as error:  # whatever a model raises on inputs that do not fit
        trace.ended = error
    trace.layers = [_main_first(layer, parameters) for layer in trace.layers]
    return trace


def _main_first(layer: LayerCall, known: Mapping[str, Tensor]) -> LayerCall:
    """Begin with the parameter that has the weight's shape, or else with the largest."""
    shape = layer.call.weight.shape if layer.call else None
    sizes = {name: (known[name].shape == shape, known[name].numel()) for name in layer.parameters}
    return replace(layer, parameters=tuple(sorted(sizes, key=lambda n: sizes[n], reverse=True)))


def _without_values(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def _leaf(tensor: Tensor) -> Tensor:
    """Pixels that autograd follows, which it would not do with bytes."""
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    return torch.empty_like(tensor, dtype=dtype).requires_grad_()


class _Layers(TorchFunctionMode):
    """Records the calls of layers, as torch functions with all their arguments."""

    def __init__(self, trace: Trace, graph: Graph, byte_images: set[int]) -> None:
        super().__init__()
        self.trace = trace
        self.graph = graph
        self.byte_images = byte_images  # ``id`` of the inputs that pass for uint8
        self.cut: dict[int, Tensor] = {}  # made of pixels, and known to autograd no more
        self.user_grad = True  # whether the forward itself, no autograd function, leaves it on
        # The modules whose forward runs, outermost first; whether an autograd function calls them.
        self.running: list[tuple[str, nn.Module, bool]] = []

    def told_by(self, copied: nn.Module) -> ExitStack:
        """Have all modules tell when their forward begins and ends, until the context is left."""

        def enter(module: nn.Module, inputs: Any) -> None:
            self.running.append((names[module], module, self.in_function()))
            self.trace.ran.add(names[module])

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.running and self.running[-1][1] is module:
                self.running.pop()

        told, names = ExitStack(), {module: name for name, module in copied.named_modules()}
        for module in names:
            if not isinstance(module, torch.jit.ScriptModule):
                told.enter_context(module.register_forward_pre_hook(enter, prepend=True))
                told.enter_context(module.register_forward_hook(leave, always_call=True))
        return told

    def in_function(self) -> bool:
        """Whether the forward of a custom autograd function runs: it turns gradients off."""
        return self.user_grad and not torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func)
        if answer is not None:
            output = answer(self, func, args, kwargs)
            self._note(getattr(func, "__name__", ""), args, kwargs, output)
            return output
        if isinstance(func, MethodWrapperType):  # reads an attribute
            return func(*args, **kwargs)
        call = read_call(func, args, kwargs)
        try:
            after = self._record(call) if call else None
            output = self.run(func, args, kwargs)
        except Exception:
            self.trace.mismatch = mismatch_of(func, args, kwargs, self._kind_of)
            raise
        if after is not None:
            self.graph.put(output, after)
        else:
            self._note(getattr(func, "__name__", ""), args, kwargs, output)
        return output

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function; keep the graph of what comes from the pixels under ``no_grad`` too."""
        self.user_grad = self.user_grad or torch.is_grad_enabled()
        given = list(tensors_in((args, kwargs)))
        with torch.set_grad_enabled(torch.is_grad_enabled() or any(map(self._kind_of, given))):
            try:
                output = func(*args, **kwargs)
            except RuntimeError:  # stft and others refuse a window on the CPU beside meta pixels
                if {tensor.is_meta for tensor in given} != {True, False}:
                    raise
                args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
                output = func(*args, **kwargs)
        cast = id(output) in self.byte_images  # a cast to fractions, which is none here
        return output.clone() if cast else output

    def _kind_of(self, tensor: Tensor) -> Kind | None:
        return self.graph.flow(tensor).kind

    def _record(self, call: LinearCall) -> Flow | None:
        """Record a layer's call if it reads pixels; return what its output is, if that is known."""
        weight, flow = self.graph.flow(call.weight), self.graph.flow(call.input)
        if flow.kind is Kind.PIXELS and weight.kind and call.convolution:
            self.trace.dynamic = True
        if not weight.parameters or flow.kind is None:
            return None
        trained = weight.parameters & self.graph.trainable
        if flow.kind is not Kind.FEATURES:
            self.graph.layers.append(
                LayerCall(
                    call=call,
                    operation=call.name,
                    flow=flow,
                    parameters=tuple(sorted(weight.parameters)),
                    modules=tuple(name for name, *_ in self.running),
                    derived=id(call.weight) not in self.graph.leaves,
                    obstacle=self._obstacle(weight, call),
                    frozen=not trained,
                )
            )
        if trained:
            self.graph.passed_layer = True
            return replace(flow, kind=Kind.FEATURES)
        return None  # a constant: the graph tells

    def _obstacle(self, weight: Flow, call: LinearCall) -> str | None:
        if call.weight.is_complex():
            return "it is complex, and TrAct treats real weights"
        if not self.in_function():
            return None
        # An autograd function that calls the layer's module, such as a checkpoint, is in order.
        for _, module, inside in reversed(self.running):
            held = (self.graph.flow(parameter).parameters for parameter in module.parameters())
            if inside and weight.parameters <= frozenset[str]().union(*held):
                return None
        return "it is applied in an autograd function with a backward of its own"

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note what the graph does not tell of an operation that is no layer."""
        if name in _STATISTICS:
            self._note_statistic(args, output)
        if not isinstance(output, Tensor):
            return
        discrete = not (output.is_floating_point() or output.is_complex())
        if not discrete and (not self.cut or name in _SELECTING):
            return
        if name in _LIKE_ANOTHER or name in _BLANK:
            args, kwargs = args[:1] if name in _LIKE_ANOTHER else (), {}
        given = list(tensors_in((args, kwargs)))
        cut = any(id(tensor) in self.cut for tensor in given)
        if discrete:  # integers and comparisons are no longer affine in the pixels
            kinds = {self._kind_of(tensor) for tensor in given if tensor.requires_grad}
            cut = cut or not kinds.isdisjoint((Kind.PIXELS, Kind.NONLINEAR))
        if cut and output.grad_fn is None:
            self.cut[id(output)] = output
        elif cut and self._kind_of(output) is Kind.PIXELS:
            flow = self.graph.flow(output)
            self.graph.put(output, replace(flow, kind=Kind.NONLINEAR))

    def _note_statistic(self, args: tuple[Any, ...], output: Any) -> None:
        """Mark means, deviations and extremes of whole images: they may standardise the image."""
        flow = self.graph.flow(args[0]) if isinstance(args[0], Tensor) else NOTHING
        if flow.kind not in (Kind.PIXELS, Kind.NONLINEAR):
            return
        area = math.prod(sorted(args[0].shape[1:])[-2:])
        for tensor in tensors_in(output):
            if tensor.numel() * area <= args[0].numel():
                self.graph.put(tensor, replace(self.graph.flow(tensor), statistic=True))


Answer = Callable[[_Layers, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _on_cpu(layers: _Layers, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer CPU for the meta device, on which models cannot autocast or make tensors."""
    device = func(*args)
    return torch.device("cpu") if device.type == "meta" else device


def _set_grad(layers: _Layers, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layers.user_grad = bool(args[0])
    return func(*args, **kwargs)


def _tolist(layers: _Layers, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return list_of(args[0]) if args[0].is_meta else func(*args)


def _from_data(layers: _Layers, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a tensor of numbers on the CPU: the forward may read it back."""
    return func(*args, **{**kwargs, "device": None})


def _same(layers: _Layers, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a view instead of what leaves the graph, such as ``detach``: follow the pixels."""
    if layers.graph.flow(args[0]).kind is None:
        return func(*args, **kwargs)
    return layers.run(torch.Tensor.view_as, (args[0], args[0]), {})


def _keep_grad(layers: _Layers, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args[0].grad_fn is not None else func(*args, **kwargs)


def _embedding(layers: _Layers, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args[0].is_floating_point():  # torch 2.11 does not say so on meta
        if layers.graph.flow(args[0]).kind is Kind.PIXELS:
            layers.trace.looked_up = next(iter(layers.graph.flow(args[1]).parameters), "a table")
        raise TypeError("embedding takes integers")
    return func(*args, **kwargs)


def _dtype(layers: _Layers, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return torch.uint8 if id(args[0]) in layers.byte_images else func(*args)


def _is_fractional(layers: _Layers, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    return id(args[0]) not in layers.byte_images and func(*args)


def _byte(layers: _Layers, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pixels made bytes, as images are kept, are only rounded."""
    to_bytes = func is torch.Tensor.byte or torch.uint8 in (*args[1:], kwargs.get("dtype"))
    if to_bytes and layers.graph.flow(args[0]).kind is Kind.PIXELS:
        return layers.run(torch.round, args[:1], {})
    return layers.run(func, args, kwargs)


def _recurrent(layers: _Layers, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a recurrent layer on one step, and repeat its output.

    A step takes about a millisecond even where nothing is computed, and timm's sequencer2d, which
    scans rows and columns of an image, has thousands of them.
    """
    if len(args) != 9:  # eight where the sequences are packed
        return func(*args, **kwargs)
    time = int(args[-1])
    states = tree_map_only(Tensor, lambda state: torch.empty_like(state, device="meta"), args[1])
    output, *states = func(args[0].narrow(time, 0, 1), states, *args[2:], **kwargs)
    return (output.repeat_interleave(args[0].shape[time], time), *states)


_ANSWERS: dict[Callable[..., Any], Answer] = {
    torch.Tensor.device.__get__: _on_cpu,
    # What torch.no_grad calls; is_grad_enabled does not tell who turned gradients off.
    torch._C._set_grad_enabled: _set_grad,
    torch.Tensor.dtype.__get__: _dtype,  # type: ignore[attr-defined]
    torch.Tensor.is_floating_point: _is_fractional,
    torch.is_floating_point: _is_fractional,
    torch.Tensor.tolist: _tolist,
    torch.tensor: _from_data,
    torch.as_tensor: _from_data,
    torch.Tensor.detach: _same,
    torch.Tensor.data.__get__: _same,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_: _keep_grad,
    torch.Tensor.requires_grad.__set__: _keep_grad,  # type: ignore[attr-defined]
    F.embedding: _embedding,
    torch.Tensor.to: _byte,
    torch.Tensor.byte: _byte,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
}

_STATISTICS = frozenset(
    "amax amin aminmax max mean median min norm quantile std std_mean sum var var_mean "
    "linalg_vector_norm".split()
)

_LIKE_ANOTHER = frozenset("expand_as view_as reshape_as type_as to".split())

_BLANK = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros "
    "new_ones new_empty new_full".split()
)
"""What reads the shape of a tensor alone; those above, that of their second."""

_SELECTING = frozenset(
    "__getitem__ __setitem__ index_select gather take masked_select index_put index_put_".split()
)
"""What chooses the elements is not mixed into them."""
