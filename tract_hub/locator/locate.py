"""From a trace of the pixels to a model's first layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tract_hub.errors import StemNotFoundError, TractWarning, UnsupportedStemError
from tract_hub.locator.graph import Kind, LayerCall
from tract_hub.locator.meta_copy import has_user_pre_hook
from tract_hub.locator.search import ADVICE, Attempt, follow, refuse_scripted
from tract_hub.locator.trace import Trace
from tract_hub.locator.unwrap import unwrap
from tract_hub.locator.zoos.lookup import declared_stems
from tract_hub.method.calls import Convolution
from tract_hub.stem import Site, Stem, holder_of


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
    groups = _first_layers(attempt.trace)
    if not groups:
        refuse_scripted(inner)
        raise StemNotFoundError(_why_none(inner, attempt.trace))
    stems = [_stem(inner, attempt, layers, prefix) for layers in groups]
    stems.sort(key=lambda stem: stem.weight_name)
    stems[0] = replace(stems[0], notes=(*stems[0].notes, *_left_out(attempt.trace, prefix)))
    declared = {prefix + name for name in declared_stems(inner)}
    found = {stem.weight_name for stem in stems}
    if not declared <= found:
        warnings.warn(
            f"{type(inner).__name__}: its zoo declares {', '.join(sorted(declared))} as first "
            f"layer, but the pixels reach {', '.join(sorted(found))}, which is used",
            TractWarning,
            stacklevel=2,
        )
    return tuple(stems)


def _first_layers(trace: Trace) -> list[list[LayerCall]]:
    """List each weight's calls on pixels; a frozen layer in front of another is a constant."""
    reading = [layer for layer in trace.layers if layer.flow.kind is Kind.PIXELS]
    constants = {n for layer in reading if not layer.frozen for n in layer.flow.frozen}
    groups: dict[tuple[str, ...], list[LayerCall]] = {}
    for layer in reading:
        in_front = layer.flow.frozen or not constants.isdisjoint(layer.parameters)
        if not (layer.frozen and in_front):
            groups.setdefault(layer.parameters, []).append(layer)
    return list(groups.values())


def _why_none(model: nn.Module, trace: Trace) -> str:
    name = type(model).__name__
    for layer in trace.layers:
        through = " → ".join(layer.flow.path)
        if not {"bmm", "softmax"}.isdisjoint(layer.flow.path):
            through = f"an attention on the pixels themselves ({through})"
        return f"{name}: the pixels reach {layer.parameters[0]!r} only through {through}; {ADVICE}"
    return f"{name}: no layer with a weight reads the pixels; {ADVICE}"


def _stem(model: nn.Module, attempt: Attempt, layers: list[LayerCall], prefix: str) -> Stem:
    """Describe one first layer; refuse what cannot be exact."""
    first, weight = layers[0], layers[0].parameters[0]
    module_name = holder_of(weight)
    module = model.get_submodule(module_name)
    obstacle = next((layer.obstacle for layer in layers if layer.obstacle), None)
    if first.call is None or obstacle:
        kind = type(module)
        ours = kind.__module__.startswith("torch.nn")
        obstacle = obstacle or (
            f"in {'nn.' if ours else ''}{kind.__name__} (by {first.operation!r}), which "
            "TrAct does not treat: it treats Conv1d, Conv2d, Conv3d, Linear, and what calls "
            "torch's functions of these names with a weight"
        )
        raise UnsupportedStemError(
            f"{type(model).__name__}: {weight!r} reads the pixels, but {obstacle}; {ADVICE}"
        )
    return Stem(
        weight_name=prefix + weight,
        module_name=(prefix + module_name).rstrip("."),
        module=module,
        in_features=first.call.in_features,
        operation=first.operation,
        geometry=_in_words(first.call.convolution),
        path=first.flow.path,
        sites=tuple(_sites(attempt.copied, layers, prefix)),
        uses=len(layers),
        derived=any(layer.derived for layer in layers),
        notes=(*_notes(layers), *_siblings(model, module_name, attempt.trace, prefix)),
        reason=_reason(model, attempt, layers),
    )


def _sites(copied: nn.Module, layers: list[LayerCall], prefix: str) -> Iterator[Site]:
    """Yield the innermost module around each call that holds all its parameters."""
    known = dict(copied.named_parameters())
    parameters = [id(known[name]) for name in layers[0].parameters]
    for layer in {(layer.modules, layer.operation): layer for layer in layers}.values():
        for name in reversed(layer.modules):
            module = copied.get_submodule(name)
            below = {id(p): path for path, p in module.named_parameters(remove_duplicate=False)}
            if all(parameter in below for parameter in parameters):
                relative = tuple(below[parameter] for parameter in parameters)
                yield Site((prefix + name).rstrip("."), layer.operation, relative)
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


def _siblings(model: nn.Module, name: str, trace: Trace, prefix: str) -> Iterator[str]:
    """Name layers that other inputs may use instead, such as those of a dictionary by sensor."""
    parent = name.rpartition(".")[0]
    among, module = model.get_submodule(parent), model.get_submodule(name)
    for path, other in among.named_children():
        ran = f"{parent}.{path}".lstrip(".") in trace.ran
        if ran or type(other) is not type(module) or type(among) not in _COLLECTIONS:
            continue
        if [p.shape for p in other.parameters()] == [p.shape for p in module.parameters()]:
            yield (
                f"'{prefix}{parent}.{path}' is alike, and the example images did not reach it: "
                "if it reads pixels too, name both with stems=[…]"
            )


_COLLECTIONS = (nn.ModuleDict, nn.ModuleList)


def _left_out(trace: Trace, prefix: str) -> Iterator[str]:
    """Name the layers that read the pixels too, and are no first layers."""
    if trace.dynamic:
        yield "a convolution reads the pixels with a weight that is made of them: left ordinary"
    first = {n for la in trace.layers if la.flow.kind is Kind.PIXELS for n in la.parameters}
    ways = {
        Kind.MIXED: "joined with or moved by learnt features",
        Kind.NONLINEAR: "no longer linear",
    }
    for kind, way in ways.items():
        names = {
            prefix + layer.parameters[0]: layer.flow.path
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
    hooked = [name for name in first.modules if has_user_pre_hook(model.get_submodule(name))]
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
