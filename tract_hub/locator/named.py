"""First layers that the user names, where they should not be searched for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from operator import attrgetter

from torch import nn

from tract_hub.errors import StemNotFoundError, UnsupportedStemError
from tract_hub.locator.unwrap import unwrap
from tract_hub.names import did_you_mean
from tract_hub.stem import Site, Stem, holder_of

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def named_stems(
    model: nn.Module, stems: Sequence[str | Stem], present: Mapping[str, Stem]
) -> tuple[Stem, ...]:
    """Describe the layers that a user named, or named the weights of, sorted by these.

    A ``Stem`` may be of this model or of one of the same build, and a name with or without what
    wrappers put before it. The names of those that TrAct is on, ``present``, stand for these.
    """
    several = isinstance(stems, (Sequence, Set)) and not isinstance(stems, str)
    if not several or not all(isinstance(stem, (str, Stem)) for stem in stems):
        raise TypeError("stems must be a list of names of layers, such as ['conv1']")
    if not stems:
        raise StemNotFoundError("stems is empty: name at least one layer, or leave it out")
    known = [present.get(stem, stem) if isinstance(stem, str) else stem for stem in stems]
    found = [_checked(model, s) if isinstance(s, Stem) else _named(model, s) for s in known]
    unique: dict[str, Stem] = {}
    for stem in sorted(found, key=lambda stem: stem.weight_name):
        if not any(stem.sites[0] in known.sites for known in unique.values()):  # one weight, twice
            unique[stem.weight_name] = stem
    return tuple(unique.values())


def _checked(model: nn.Module, stem: Stem) -> Stem:
    """Return a stem that was found before, in this model or in one of the same build."""
    try:
        if not stem.sites:
            raise AttributeError("the stem does not say where it is applied")
        for site in stem.sites:
            module = model.get_submodule(site.module_name)
            for parameter in site.parameters:
                attrgetter(parameter)(module)
    except AttributeError as error:
        raise StemNotFoundError(
            f"{type(model).__name__} does not have the layer of the stem {stem.weight_name!r} "
            f"({error}): pass what locate finds in this model, or the layer's name"
        ) from error
    return stem


def _named(model: nn.Module, entry: str) -> Stem:
    modules = dict(model.named_modules(remove_duplicate=False))
    named = model.named_parameters(remove_duplicate=False)
    parameters = {name: p for name, p in named if "bias" not in name.split(".")}
    for name in (entry, unwrap(model)[1] + entry, entry.removesuffix(".weight")):
        layer = holder_of(name) if name in parameters else name
        if name in parameters and not isinstance(modules[layer], _LAYERS):
            return _free_weight(name, modules[layer], parameters[name])
        if layer in modules:
            stem = _stem_of(layer, modules[layer])
            return replace(stem, sites=(*stem.sites, *_tied(model, stem)))
    hint = did_you_mean(repr(entry), map(repr, filter(None, modules)))
    raise StemNotFoundError(f"{type(model).__name__} has no layer {entry!r}; {hint}")


def _free_weight(name: str, module: nn.Module, weight: nn.Parameter) -> Stem:
    """Describe a weight that a module of the user applies by a function of torch."""
    if weight.dim() < 2 or weight.is_complex():
        raise UnsupportedStemError(f"{name!r} is no real matrix or kernel that a layer applies")
    operation = f"conv{weight.dim() - 2}d" if weight.dim() > 2 else "linear"
    return Stem(
        weight_name=name,
        module_name=holder_of(name),
        module=module,
        in_features=weight.shape[1:].numel(),
        operation=operation,
        sites=(Site(holder_of(name), operation, (name.rpartition(".")[2],)),),
        reason="named by the user",
    )


def _stem_of(name: str, module: nn.Module) -> Stem:
    if not isinstance(module, _LAYERS):
        raise UnsupportedStemError(
            f"{name!r} is a {type(module).__name__}: TrAct treats Conv1d, Conv2d, Conv3d, Linear "
            "and their subclasses; leave stems out to have the first layers found"
        )
    if any(parameter.is_complex() for parameter in module.parameters()):
        raise UnsupportedStemError(f"{name!r} is complex, and TrAct treats real weights")
    # Not by module.weight: a spectral norm would step on being read.
    if isinstance(module, nn.Linear):
        features = module.in_features
    else:
        features = module.in_channels // module.groups * math.prod(module.kernel_size)
    site = _site(name, module)
    return Stem(
        weight_name=f"{name}.{site.parameters[0]}".lstrip("."),
        module_name=name,
        module=module,
        in_features=features,
        operation=site.operation,
        sites=(site,),
        derived=site.parameters != ("weight",),
        reason="named by the user",
    )


def _tied(model: nn.Module, stem: Stem) -> Iterator[Site]:
    """Where else the weight of a layer is applied."""
    held = dict(stem.module.named_parameters(recurse=False))
    own = {id(held[name]) for name in stem.sites[0].parameters if name in held}
    for name, module in model.named_modules():
        shared = not own.isdisjoint(map(id, module.parameters(recurse=False)))
        if shared and module is not stem.module and isinstance(module, _LAYERS):
            yield _site(name, module)


def _site(name: str, module: nn.Module) -> Site:
    """A weight may be made of several parameters, the largest of which gives it its name."""
    sizes = {n: p.numel() for n, p in module.named_parameters() if "bias" not in n.split(".")}
    parameters = tuple(sorted(sizes, key=lambda parameter: -sizes[parameter]))
    kernel = getattr(module, "kernel_size", ())
    return Site(name, f"conv{len(kernel)}d" if kernel else "linear", parameters)
