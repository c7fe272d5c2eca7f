"""From a trace of the pixels to a model's first layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from tract_hub.errors import StemNotFoundError, TractWarning, UnsupportedStemError
from tract_hub.locator.graph import Kind
from tract_hub.locator.meta_copy import has_user_pre_hook
from tract_hub.locator.search import ADVICE, Attempt, follow, refuse_scripted
from tract_hub.locator.trace import LayerCall, Trace
from tract_hub.locator.unwrap import unwrap
from tract_hub.locator.zoos.lookup import declared_stems
from tract_hub.method.calls import Convolution, LinearCall
from tract_hub.stem import Site, Stem


def locate(
    model: nn.Module,
    example_inputs: Any = None,
    pixels: Sequence[str | int] | None = None,
) -> tuple[Stem, ...]:
    """Find the first layers of a model by following its pixels through one forward.

    Nothing is computed (the forward runs on the meta device, on a copy without weights), and
    nothing about the model or the process changes.

    Args:
        model: any module, on any device, in any mode, with TrAct on it or not.
        example_inputs: inputs of its forward: a tensor, a tuple of positional inputs or a mapping
            of named ones. Only shapes and dtypes matter. None: they are guessed.
        pixels: which inputs are images: names of the forward's parameters, keys of a mapping that
            it takes, or positions. None: those that the model's zoo calls so, or that have an
            image's shape.

    Returns:
        The first layers, sorted by the name of their weight. A frozen layer counts as a constant,
        so the next layer is the first. It is returned itself if a nonlinearity follows before any
        layer that learns.

    Raises:
        TypeError: the model is no module.
        StemNotFoundError: no layer reads the pixels before they pass a nonlinearity.
        UnsupportedStemError: a first layer cannot be treated exactly.
        ExampleInputError: the model could not be run with the inputs at hand.

    Example:
        >>> [stem.weight_name for stem in tract_hub.locate(timm.create_model("resnet18"))]
        ['conv1.weight']

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"locate takes a torch.nn.Module, got {type(model).__name__}")
    inner, prefix = unwrap(model)
    attempt = follow(inner, example_inputs, pixels)
    groups = _first_layers(inner, attempt.copied, attempt.trace)
    stems = [_stem(inner, attempt, call, layers, prefix) for call, layers in groups]
    stems.sort(key=lambda stem: stem.weight_name)
    _compare_with_zoo(inner, stems, prefix)
    return tuple(stems)


def _compare_with_zoo(model: nn.Module, stems: list[Stem], prefix: str) -> None:
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
    model: nn.Module, copied: nn.Module, trace: Trace
) -> Iterator[tuple[LinearCall, list[LayerCall]]]:
    """Yield each weight's first call and all its calls on pixels; refuse what cannot be exact."""
    reading = [layer for layer in trace.layers if layer.flow.kind is Kind.PIXELS]
    constants = {n for layer in reading if not layer.frozen for n in layer.flow.frozen}
    groups: dict[tuple[str, ...], list[LayerCall]] = {}
    for layer in reading:
        in_front = layer.flow.frozen or not constants.isdisjoint(layer.parameters)
        if not (layer.frozen and in_front):
            groups.setdefault(layer.parameters, []).append(layer)
    if not groups:
        refuse_scripted(model)
        raise StemNotFoundError(_why_none(model, trace))
    for layers in groups.values():
        call = layers[0].call
        obstacle = next((la.obstacle for la in layers if la.obstacle), None)
        if call is None or obstacle:
            weight = _main_parameter(copied, layers[0])
            kind = type(model.get_submodule(_holder(weight)))
            ours = kind.__module__.startswith("torch.nn")
            obstacle = obstacle or (
                f"in {'nn.' if ours else ''}{kind.__name__} (by {layers[0].operation!r}), which "
                "TrAct does not treat: it treats Conv1d, Conv2d, Conv3d, Linear, and what calls "
                "torch's functions of these names with a weight"
            )
            raise UnsupportedStemError(
                f"{type(model).__name__}: {weight!r} reads the pixels, but {obstacle}; {ADVICE}"
            )
        yield call, layers


def _why_none(model: nn.Module, trace: Trace) -> str:
    name = type(model).__name__
    for layer in trace.layers:
        through = " → ".join(layer.flow.path)
        if not {"bmm", "softmax"}.isdisjoint(layer.flow.path):
            through = f"an attention on the pixels themselves ({through})"
        return f"{name}: the pixels reach {layer.parameters[0]!r} only through {through}; {ADVICE}"
    return f"{name}: no layer with a weight reads the pixels; {ADVICE}"


def _stem(
    model: nn.Module, attempt: Attempt, call: LinearCall, layers: list[LayerCall], prefix: str
) -> Stem:
    copied, first = attempt.copied, layers[0]
    weight = _main_parameter(copied, first)
    module_name = _holder(weight)
    return Stem(
        weight_name=prefix + weight,
        module_name=(prefix + module_name).rstrip("."),
        module=model.get_submodule(module_name),
        in_features=call.in_features,
        operation=call.name,
        geometry=_in_words(call.convolution),
        path=first.flow.path,
        sites=tuple(_sites(copied, layers, prefix)),
        uses=len(layers),
        derived=any(layer.derived for layer in layers),
        notes=(*_notes(layers), *_left_out(attempt.trace, prefix)),
        reason=_reason(model, attempt, layers),
    )


def _holder(parameter: str) -> str:
    """Name of the module whose parameter this is, or whose weight it parametrizes."""
    before, parametrized, _ = f".{parameter}".partition(".parametrizations.")
    path = before if parametrized else before.rpartition(".")[0]
    return path.removeprefix(".")


def _main_parameter(copied: nn.Module, layer: LayerCall) -> str:
    """The parameter that has the weight's shape, or else the largest that it is made of."""
    known = dict(copied.named_parameters())  # scripted modules have no get_parameter
    parameters = {name: known[name] for name in layer.parameters}
    shape = layer.call.weight.shape if layer.call else None
    return max(parameters, key=lambda n: (parameters[n].shape == shape, parameters[n].numel()))


def _sites(copied: nn.Module, layers: list[LayerCall], prefix: str) -> Iterator[Site]:
    """Yield the innermost module around each call that holds all its parameters."""
    names = {id(module): name for name, module in copied.named_modules()}
    main = _main_parameter(copied, layers[0])
    order = sorted(layers[0].parameters, key=lambda name: name != main)
    parameters = [id(copied.get_parameter(name)) for name in order]
    for layer in {(layer.modules, layer.operation): layer for layer in layers}.values():
        for module in reversed(layer.modules):
            below = {id(p): name for name, p in module.named_parameters(remove_duplicate=False)}
            if all(parameter in below for parameter in parameters):
                module_name = (prefix + names[id(module)]).rstrip(".")
                relative = tuple(below[parameter] for parameter in parameters)
                yield Site(module_name, layer.operation, relative)
                break


def _notes(layers: list[LayerCall]) -> Iterator[str]:
    passed = dict.fromkeys(name for layer in layers for name in layer.flow.passed)
    if passed:
        yield f"the pixels pass {', '.join(passed)} first: the layer's own input is used"
    frozen = dict.fromkeys(name for layer in layers for name in layer.flow.frozen)
    if frozen:
        yield (
            f"the pixels pass {', '.join(frozen)} first, which is frozen and taken for a constant: "
            "the layer's own input is used"
        )


def _left_out(trace: Trace, prefix: str) -> Iterator[str]:
    """Name the layers that read the pixels too, and are no first layers."""
    first = {n for la in trace.layers if la.flow.kind is Kind.PIXELS for n in la.parameters}
    ways = {
        Kind.MIXED: "joined with or moved by learnt features",
        Kind.NONLINEAR: "no longer linear",
    }
    for kind, way in ways.items():
        names = {
            prefix + layer.parameters[-1]: layer.flow.path
            for layer in trace.layers
            if layer.flow.kind is kind
            and not (layer.flow.statistic or layer.flow.frozen)
            and first.isdisjoint(layer.parameters)
        }
        if names:
            path = " → ".join(next(iter(names.values()))[-3:])
            yield (
                f"the pixels also reach {', '.join(names)}, {way} ({path}): left ordinary, unless "
                "named in stems=[…]"
            )


def _reason(model: nn.Module, attempt: Attempt, layers: list[LayerCall]) -> str:
    example, first = attempt.example, layers[0]
    inputs = dict.fromkeys(name for layer in layers for name in layer.flow.inputs)
    through = f"through {' → '.join(first.flow.path)}" if first.flow.path else "directly"
    reason = f"reads the pixels of {', '.join(inputs)} {through}"
    parts = [call.method for call in (example, *example.also) if call.method != "forward"]
    if parts:
        reason += f", followed in {' and '.join(parts)} alone"
    if example.skipped:
        reason += f"; {', '.join(example.skipped)} not taken for pixels"
    names = {id(module): name for name, module in attempt.copied.named_modules()}
    around = [names[id(module)] for module in first.modules]
    hooked = [name for name in around if has_user_pre_hook(model.get_submodule(name))]
    if hooked:  # the pixels were followed without calling the user's hooks
        owner = hooked[-1] or "the model"
        reason += f", or what the forward pre-hook of {owner} makes of them"
    return reason


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
