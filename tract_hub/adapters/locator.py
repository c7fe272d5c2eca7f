"""From a trace of the pixels to a model's first layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from tract_hub.adapters.attempts import Attempt, follow
from tract_hub.adapters.tracing.dataflow import Consumption, Trace
from tract_hub.adapters.tracing.flow import Flow, Kind
from tract_hub.adapters.tracing.skeleton import has_pre_hook_of_a_user, meta_skeleton
from tract_hub.adapters.wrappers import unwrap
from tract_hub.adapters.zoos.examples import Example
from tract_hub.adapters.zoos.lookup import declared_stems
from tract_hub.errors import StemNotFoundError, TractWarning, UnsupportedStemError
from tract_hub.method.calls import Convolution, LinearCall
from tract_hub.stem import Site, Stem


def locate(model: nn.Module, example_inputs: Any = None) -> tuple[Stem, ...]:
    """Find the first layers of a model by following its pixels through one forward.

    Nothing is computed (the forward runs on the meta device, on a copy without weights), and
    nothing about the model changes.

    Args:
        model: any module, on any device, in any mode.
        example_inputs: inputs of its forward, where its zoo does not tell them: a tensor, a tuple
            of positional inputs or a mapping of named ones.

    Returns:
        The first layers, sorted by the name of their weight.

    Raises:
        TypeError: the model is no module.
        StemNotFoundError: no layer reads the pixels before they pass a nonlinearity.
        UnsupportedStemError: a first layer cannot be treated exactly.
        ExampleInputError: the model could not be run with the inputs at hand.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"locate takes a torch.nn.Module, got {type(model).__name__}")
    inner, prefix = unwrap(model)
    stems = stems_of(inner, follow(inner, meta_skeleton(inner), example_inputs), prefix)
    _compare_with_zoo(inner, stems, prefix)
    return stems


def stems_of(model: nn.Module, attempt: Attempt, prefix: str = "") -> tuple[Stem, ...]:
    """Return the first layers that a forward showed; their names begin with ``prefix``."""
    skeleton = attempt.skeleton
    notes = _part_note(attempt.example)
    stems = [
        _stem(model, skeleton, call, layers, prefix, notes)
        for call, layers in _first_layers(model, skeleton, attempt.trace)
    ]
    return tuple(sorted(stems, key=lambda stem: stem.weight_name))


def _compare_with_zoo(model: nn.Module, stems: tuple[Stem, ...], prefix: str) -> None:
    """Warn where the model's zoo declares another first layer than the trace shows."""
    declared = {prefix + name for name in declared_stems(model) or ()}
    found = {stem.weight_name for stem in stems}
    if not declared <= found:
        warnings.warn(
            f"{type(model).__name__}: its zoo declares {', '.join(sorted(declared))} as first "
            f"layer, but the pixels reach {', '.join(sorted(found))}, which is used",
            TractWarning,
            stacklevel=3,
        )


def _first_layers(
    model: nn.Module, skeleton: nn.Module, trace: Trace
) -> Iterator[tuple[LinearCall, list[Consumption]]]:
    """Yield each weight's first call and all its consumptions of untouched pixels.

    What cannot be exact is refused.
    """
    groups: dict[tuple[str, ...], list[Consumption]] = {}
    for layer in trace.layers:
        if layer.flow.kind is Kind.PIXELS:
            groups.setdefault(layer.parameters, []).append(layer)
    if not groups:
        raise StemNotFoundError(_why_none(model, trace))
    for layers in groups.values():
        call, obstacle = layers[0].call, _obstacle(skeleton, layers, trace)
        if call is None or obstacle:
            raise UnsupportedStemError(
                f"{type(model).__name__}: {_main_parameter(skeleton, layers[0])!r} reads the "
                f"pixels, but {obstacle}; "
                "name the layers to treat with stems=[…]"
            )
        yield call, layers


def _obstacle(skeleton: nn.Module, layers: list[Consumption], trace: Trace) -> str | None:
    for layer in layers:
        if layer.call is None:
            return f"through {layer.operation!r}, which TrAct does not treat"
        if layer.weight_flow is not None:
            return "its weight is itself computed from the pixels"
        if not trace.elsewhere.isdisjoint(layer.parameters):
            return "it is applied to something else too"
        if layer.function is not None:
            name, within = layer.function
            if _applying(skeleton, layer) not in within:
                return f"in {name}, an autograd function with a backward of its own"
    return None


def _why_none(model: nn.Module, trace: Trace) -> str:
    name = type(model).__name__
    advice = "if a layer should be treated all the same, name it with stems=[…]"
    for layer in trace.layers:
        through = " → ".join(layer.flow.path)
        return f"{name}: the pixels reach {layer.parameters[0]!r} only through {through}; {advice}"
    return f"{name}: no layer with a weight reads the pixels; {advice}"


def _stem(
    model: nn.Module,
    skeleton: nn.Module,
    call: LinearCall,
    layers: list[Consumption],
    prefix: str,
    further_notes: Iterable[str],
) -> Stem:
    first = layers[0]
    weight = _main_parameter(skeleton, first)
    module_name = _holder(weight)
    return Stem(
        weight_name=prefix + weight,
        module_name=(prefix + module_name).rstrip("."),
        module=model.get_submodule(module_name),
        in_features=call.in_features,
        operation=call.name,
        geometry=_in_words(call.convolution),
        path=first.flow.path,
        sites=tuple(_sites(skeleton, layers, prefix)),
        uses=len(layers),
        derived=any(layer.derived for layer in layers),
        notes=(*_notes(layers), *further_notes),
        reason=_reason(first.flow) + _hooks_in_words(model, skeleton, first),
    )


def _holder(parameter: str) -> str:
    """Name of the module whose parameter this is, or whose weight it parametrizes."""
    before, parametrized, _ = f".{parameter}".partition(".parametrizations.")
    path = before if parametrized else before.rpartition(".")[0]
    return path.removeprefix(".")


def _main_parameter(skeleton: nn.Module, layer: Consumption) -> str:
    """The parameter that has the weight's shape, or else the largest that it is made of."""
    known = dict(skeleton.named_parameters())  # scripted modules have no get_parameter
    parameters = {name: known[name] for name in layer.parameters}
    shape = layer.call.weight.shape if layer.call else None
    return max(parameters, key=lambda n: (parameters[n].shape == shape, parameters[n].numel()))


def _sites(skeleton: nn.Module, layers: list[Consumption], prefix: str) -> Iterator[Site]:
    names = {id(module): name for name, module in skeleton.named_modules()}
    main = _main_parameter(skeleton, layers[0])
    order = sorted(layers[0].parameters, key=lambda name: name != main)
    parameters = [skeleton.get_parameter(name) for name in order]
    unique = {(layer.modules, layer.operation): layer for layer in layers}
    for layer in unique.values():
        module = _applying(skeleton, layer)
        if module is None:
            continue
        below = {id(p): n for n, p in module.named_parameters(remove_duplicate=False)}
        module_name = (prefix + names[id(module)]).rstrip(".")
        relative = tuple(below[id(parameter)] for parameter in parameters)
        yield Site(module_name, layer.operation, relative)


def _applying(skeleton: nn.Module, layer: Consumption) -> nn.Module | None:
    """The innermost module around a layer's call that holds all its parameters, if there is one."""
    known = dict(skeleton.named_parameters())
    parameters = {id(known[name]) for name in layer.parameters}
    for module in reversed(layer.modules):
        if parameters <= {id(parameter) for parameter in module.parameters()}:
            return module
    return None


def _notes(layers: list[Consumption]) -> Iterator[str]:
    trained = dict.fromkeys(name for layer in layers for name in layer.flow.trained)
    if trained:
        yield f"the pixels pass {', '.join(trained)} first: the layer's own input is used"


def _part_note(example: Example) -> list[str]:
    if example.method == "forward":
        return []
    methods = ", ".join(call.method for call in (example, *example.also))
    return [
        f"the forward could not be run on guessed inputs; the pixels were followed through "
        f"{methods} alone: pass example_inputs=… to follow them through the whole"
    ]


def _reason(flow: Flow) -> str:
    through = f"through {' → '.join(flow.path)}" if flow.path else "directly"
    return f"reads the pixels {through}"


def _hooks_in_words(model: nn.Module, skeleton: nn.Module, layer: Consumption) -> str:
    """Name whose hooks may come between: the pixels were followed without calling them."""
    names = {id(module): name for name, module in skeleton.named_modules()}
    around = [names[id(module)] for module in layer.modules]
    hooked = [n for n in around if has_pre_hook_of_a_user(model.get_submodule(n))]
    if not hooked:
        return ""
    return f", or what the forward pre-hook of {hooked[-1] or 'the model'} makes of them"


def _in_words(convolution: Convolution | None) -> str:
    if convolution is None:
        return ""
    words = ["×".join(map(str, convolution.kernel))]
    for name, values in (("stride", convolution.stride), ("dilation", convolution.dilation)):
        if set(values) != {1}:
            words.append(f"{name} {_short(values)}")
    if any(any(pair) for pair in convolution.padding):
        words.append(f"padding {_short([_short(pair) for pair in convolution.padding])}")
    if convolution.groups > 1:
        words.append(f"groups {convolution.groups}")
    return ", ".join(words)


def _short(values: Iterable[Any]) -> str:
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else "/".join(texts)
