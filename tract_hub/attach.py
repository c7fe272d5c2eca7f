"""Attach the TrAct gradient to a live model, remove it, and list where it is."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

from torch import nn

from tract_hub.config import Damping, Scope, Settings
from tract_hub.errors import TractError, TractWarning, UnsupportedStemError
from tract_hub.locator.locate import locate
from tract_hub.locator.named import named_stems
from tract_hub.locator.unwrap import unwrap
from tract_hub.method.accumulate import finish_step
from tract_hub.method.forward import (
    OPACUS,
    ModelForward,
    ScriptedTwin,
    StemForward,
    is_private,
    stand_ins,
)
from tract_hub.stem import Stem

Model = TypeVar("Model", bound=nn.Module)

_logger = logging.getLogger("tract_hub")


@dataclass(frozen=True)
class StemStatus:
    """The state of one first layer that TrAct is on.

    Attributes:
        weight_name: name of its parameter in ``model.named_parameters()``.
        module_name: name of the module that applies it.
        lam: the damping λ.
        scope: whose rows the Gram matrix is taken over.
        damping: whether λ is absolute, or relative to the input's mean square.
        frozen: whether the weight takes no gradient now.
        training: whether the module is in training mode; in eval mode it is the ordinary layer.
        applied: whether a forward has applied TrAct since ``enable``.

    """

    weight_name: str
    module_name: str
    lam: float
    scope: Scope
    damping: Damping
    frozen: bool
    training: bool
    applied: bool


class Status(tuple[StemStatus, ...]):
    """The first layers that TrAct is on, sorted by name; its ``str`` is a table.

    Example:
        >>> print(tract_hub.status(model))
        first layer              λ    scope  damping   weight     mode      applied
        patch_embed.proj.weight  0.1  local  absolute  trainable  training  yes

    """

    def __str__(self) -> str:
        if not self:
            return "TrAct is on no layer of this model."
        rows = [("first layer", "λ", "scope", "damping", "weight", "mode", "applied")]
        for stem in self:
            weight = "frozen" if stem.frozen else "trainable"
            mode, applied = "training" if stem.training else "eval", "yes" if stem.applied else "no"
            name, lam = stem.weight_name, f"{stem.lam:g}"
            rows.append((name, lam, stem.scope, stem.damping, weight, mode, applied))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


def enable(
    model: Model,
    lam: float | Mapping[str, float] = 0.1,
    *,
    stems: Sequence[str | Stem] | None = None,
    scope: Scope = "local",
    damping: Damping = "absolute",
    pixels: Sequence[str] | None = None,
    example_inputs: Any = None,
    **unknown: NoReturn,
) -> Model:
    """Give the first layers of a model the TrAct gradient.

    After ``backward()``, the gradient of each first layer's weight is the ordinary one times
    (XᵀX / rows + λI)⁻¹ (Petersen et al., NeurIPS 2024, section 3). X is the layer's unfolded
    input: one row for each image and output position, one column for each number that the weight
    multiplies there. Everything else stays as it is: the classes, the parameters, the state dict,
    every forward value and every other gradient. On an enabled model, the new settings replace the
    old ones; a schedule of λ calls ``enable`` again.

    Args:
        model: any module; changed in place.
        lam: the damping λ > 0: 0.1 for inputs standardised to mean 0 and deviation 1. A mapping
            gives each first layer its own, by the name of its weight, its module, or a part of the
            model that it is in.
        stems: the layers, by name or by the name of their weight. None: they are searched for.
        scope: ``"local"``, the rows of this process's batch; ``"global"``, the rows of all
            processes and of all backwards of an optimizer's step, see ``finish``.
        damping: ``"absolute"``, λ as in the paper; ``"relative"``, λ times the mean square of the
            input, which does not depend on the units of the pixels.
        pixels: the forward's inputs that are images, by name. None: they are guessed.
        example_inputs: inputs to follow the pixels with, see ``locate``. None: they are guessed.
        **unknown: none is taken; the error lists the names above.

    Returns:
        The same object.

    Raises:
        ValueError: λ is not a finite positive number, the scope or the damping is unknown.
        TypeError: the model is no module, ``stems`` is no list of names, or an argument is unknown.
        TractError: no first layer can be treated exactly; the model is as it was.

    Example:
        >>> model = tract_hub.enable(timm.create_model("vit_small_patch16_224"))

    """
    _check_module("enable", model)
    for name in unknown:  # torch_tract calls λ `l`
        raise TypeError(
            f"enable has no argument {name!r}; it takes lam (λ, such as lam=0.1), stems, scope, "
            "damping, pixels and example_inputs"
        )
    if any(map(is_private, model.parameters())):
        raise UnsupportedStemError(OPACUS)
    base = Settings(0.1 if isinstance(lam, Mapping) else lam, scope, damping)
    found = locate(model, example_inputs, pixels) if stems is None else named_stems(model, stems)
    settings = [replace(base, lam=_lam_of(stem, lam)) for stem in found]
    if isinstance(lam, Mapping):
        _refuse_unknown(lam, found)
    for stem in found:
        _refuse(model, stem, base)
    disable(model)
    attached = _attach(model, found, settings)
    frozen = [all(forward.frozen for forward in attached[stem.weight_name]) for stem in found]
    for stem, each, is_frozen in zip(found, settings, frozen, strict=True):
        _report(stem, each, is_frozen)
    if all(frozen):  # one of several is often meant: a momentum encoder, what LoRA adapts
        _warn_of_frozen(found)
    if stems is None:
        _report_siblings(model, found)
    return model


def disable(model: Model) -> Model:
    """Remove TrAct from a model: every ``forward`` is as before ``enable``.

    Returns:
        The same object.

    Raises:
        TypeError: the model is no module.

    Example:
        >>> tract_hub.disable(model)

    """
    _check_module("disable", model)
    for module in model.modules():
        for stand_in in list(stand_ins(module)):
            stand_in.detach()
    return model


def status(model: nn.Module) -> Status:
    """List the first layers that TrAct is on; empty if it is off.

    Raises:
        TypeError: the model is no module.

    Example:
        >>> [stem.weight_name for stem in tract_hub.status(model)]
        ['patch_embed.proj.weight']

    """
    _check_module("status", model)
    found: dict[str, StemStatus] = {}
    for name, stem in stem_forwards(model):
        weight = f"{name}.{stem.parameters[0]}".lstrip(".")
        used = found[weight].applied if weight in found else False
        if stem.first is not None:  # of a weight that two modules share, the first speaks
            continue
        found[weight] = StemStatus(
            weight_name=weight,
            module_name=name,
            lam=stem.settings.lam,
            scope=stem.settings.scope,
            damping=stem.settings.damping,
            frozen=stem.frozen,
            training=stem.module.training,
            applied=used or stem.used,
        )
    return Status(found[weight] for weight in sorted(found))


def finish(model: nn.Module) -> None:
    """Complete the gradients of this step if the scope is ``"global"``; otherwise do nothing.

    Call it in every process, after the last backward and before anything reads gradients, such as
    clipping. If nobody calls it, the optimizer's step completes the gradients.

    Raises:
        TypeError: the model is no module.

    Example:
        >>> loss.backward()
        >>> tract_hub.finish(model)
        >>> torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    """
    _check_module("finish", model)
    sums = {id(stem.accumulator): stem.accumulator for _, stem in stem_forwards(model)}
    finish_step(accumulator for accumulator in sums.values() if accumulator is not None)


def stem_forwards(model: nn.Module) -> Iterator[tuple[str, StemForward]]:
    """Yield the name of each module that applies a first layer's weight, and its stand-in."""
    for name, module in model.named_modules():
        for stand_in in stand_ins(module):
            if isinstance(stand_in, StemForward):
                yield name, stand_in


def _attach(
    model: nn.Module, stems: Sequence[Stem], settings: Sequence[Settings]
) -> dict[str, list[StemForward]]:
    attached: dict[str, list[StemForward]] = {}
    by_module: dict[str, StemForward] = {}
    for stem, each in zip(stems, settings, strict=True):
        features = getattr(stem.module, "groups", 1), stem.in_features
        forwards = attached.setdefault(stem.weight_name, [])
        for site in stem.sites:
            module = model.get_submodule(site.module_name)
            first = forwards[0] if forwards else None
            forward = StemForward(module, site.parameters, stem.weight_name, features, each, first)
            forward.attach()
            forwards.append(forward)
            by_module[site.module_name] = forward
    paths = [name.split(".") if name else [] for name in by_module]
    for name in {".".join(path[:depth]) for path in paths for depth in range(len(path) + 1)}:
        ScriptedTwin(model.get_submodule(name)).attach()
    inner, prefix = unwrap(model)
    names = {name.removeprefix(prefix): forward for name, forward in by_module.items()}
    ModelForward(inner, names).attach()
    return attached


def _refuse(model: nn.Module, stem: Stem, settings: Settings) -> None:
    """Refuse what would not be treated exactly, before anything is changed."""
    if type(model).__name__ == "DataParallel" and len(getattr(model, "device_ids", ())) > 1:
        raise UnsupportedStemError(
            "torch.nn.DataParallel copies a model without its forward: train with "
            "torch.nn.parallel.DistributedDataParallel"
        )
    if settings.scope == "global" and stem.derived:
        raise UnsupportedStemError(
            f"scope='global' corrects the gradient of a parameter, and {stem.weight_name!r} is "
            "computed from others (standardised or parametrized): pass scope='local'"
        )


def _lam_of(stem: Stem, lam: float | Mapping[str, float]) -> float:
    """Return the λ of a stem: the longest name in the mapping that it is, or is in."""
    if not isinstance(lam, Mapping):
        return lam
    named = [name for name in lam if _is_in(stem, name)]
    return lam[max(named, key=len)] if named else 0.1


def _refuse_unknown(lam: Mapping[str, float], stems: Sequence[Stem]) -> None:
    for name in lam:
        if not any(_is_in(stem, name) for stem in stems):
            layers = ", ".join(stem.weight_name for stem in stems)
            raise TractError(f"lam names {name!r}, but the first layers are {layers}")


def _is_in(stem: Stem, name: str) -> bool:
    return stem.weight_name == name or stem.weight_name.startswith(f"{name}.") or not name


def _report(stem: Stem, settings: Settings, frozen: bool) -> None:
    """Log one line, and warn of what a user has to know."""
    relative = " × mean square" if settings.damping == "relative" else ""
    shape = f"{stem.operation} {stem.geometry}".strip()
    _logger.info(
        "TrAct λ=%g%s on %s (%s, %d features%s)",
        settings.lam,
        relative,
        stem.weight_name,
        shape,
        stem.in_features,
        ", frozen" if frozen else "",
    )
    for note in stem.notes:
        warnings.warn(f"TrAct on {stem.weight_name}: {note}", TractWarning, stacklevel=3)


def _warn_of_frozen(stems: Sequence[Stem]) -> None:
    names = ", ".join(repr(stem.weight_name) for stem in stems)
    warnings.warn(
        f"{names} is frozen, so TrAct does nothing: unfreeze it (requires_grad_(True)) if you "
        "want to train the first layer",
        TractWarning,
        stacklevel=3,
    )


def _report_siblings(model: nn.Module, stems: Sequence[Stem]) -> None:
    """Warn of layers that other inputs may use instead, such as those of a dictionary by sensor."""
    found = {stem.module for stem in stems}
    for stem in stems:
        parent = stem.module_name.rpartition(".")[0]
        siblings = model.get_submodule(parent)
        if not isinstance(siblings, (nn.ModuleDict, nn.ModuleList)):
            continue
        for name, other in siblings.named_children():
            alike = type(other) is type(stem.module) and other not in found
            if alike and other.weight.shape == stem.module.weight.shape:
                warnings.warn(
                    f"'{parent}.{name}' is like {stem.module_name!r}, and the example images did "
                    "not reach it: if it reads pixels too, name both with stems=[…]",
                    TractWarning,
                    stacklevel=3,
                )


def _check_module(caller: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module, got {type(model).__name__}")
