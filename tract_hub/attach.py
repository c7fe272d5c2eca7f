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
    COMPUTED,
    DATA_PARALLEL,
    OPACUS,
    ModelForward,
    ScriptedTwin,
    StemForward,
    is_private,
    stand_ins,
)
from tract_hub.stem import Site, Stem, holder_of

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
    named = lam if isinstance(lam, Mapping) else {"": lam}  # the name of the whole model
    base = Settings(named.get("", 0.1), scope, damping)
    if any(map(is_private, model.parameters())):
        raise UnsupportedStemError(OPACUS)
    if stems is None:
        found = locate(model, example_inputs, pixels)
    else:
        found = named_stems(model, stems, _present(model))
    settings = [replace(base, lam=each) for each in _lam_of_each(found, named)]
    _refuse(model, found, scope)
    disable(model)
    forwards = _attach(model, found, settings)
    notes = [f"TrAct on {stem.weight_name}: {note}" for stem in found for note in stem.notes]
    if all(forward.frozen for forward in forwards):
        # One of several is often meant: a momentum encoder, what LoRA adapts.
        names = ", ".join(repr(stem.weight_name) for stem in found)
        notes.append(
            f"{names} is frozen, so TrAct does nothing: unfreeze it (requires_grad_(True)) if you "
            "want to train the first layer"
        )
    for stem, forward in zip(found, forwards, strict=True):
        _log(stem, forward)
    for note in notes:
        warnings.warn(note, TractWarning, stacklevel=2)
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
            if stand_in.module is module:
                stand_in.detach()
            else:
                stand_in.remove_from(module)
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
    forwards = list(stem_forwards(model))
    used = {forward.first or forward for _, forward in forwards if forward.applied}
    found = {
        forward: StemStatus(
            weight_name=f"{name}.{forward.parameters[0]}".lstrip("."),
            module_name=name,
            lam=forward.settings.lam,
            scope=forward.settings.scope,
            damping=forward.settings.damping,
            frozen=forward.frozen,
            training=forward.module.training,
            applied=forward in used,
        )
        for name, forward in forwards
        if forward.first is None  # of a weight that two modules share, the first speaks
    }
    return Status(sorted(found.values(), key=lambda stem: stem.weight_name))


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
    accumulators = {forward.accumulator for _, forward in stem_forwards(model)}
    finish_step(accumulator for accumulator in accumulators if accumulator is not None)


def stem_forwards(model: nn.Module) -> Iterator[tuple[str, StemForward]]:
    """Yield the name of each module that applies a first layer's weight, and its stand-in."""
    for name, module in model.named_modules():
        for stand_in in stand_ins(module):
            own = stand_in.module is module  # not that of which this is a shallow copy
            if isinstance(stand_in, StemForward) and stand_in.active and own:
                yield name, stand_in


def _present(model: nn.Module) -> dict[str, Stem]:
    """Describe the layers that TrAct is on, by the names of their weights."""
    sites: dict[StemForward, list[Site]] = {}
    for name, forward in stem_forwards(model):
        sites.setdefault(forward.first or forward, []).append(Site(name, "", forward.parameters))
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {}
    for forward, where in sites.items():
        weight = f"{where[0].module_name}.{where[0].parameters[0]}".lstrip(".")
        if weight in names:  # it may have been parametrized since
            found[weight] = Stem(
                weight_name=weight,
                module_name=holder_of(weight),
                module=model.get_submodule(holder_of(weight)),
                in_features=forward.features[1],
                operation="",
                sites=tuple(where),
                derived=len(forward.parameters) > 1 or "parametrizations" in weight,
                reason="TrAct is on it",
            )
    return found


def _lam_of_each(stems: Sequence[Stem], named: Mapping[str, float]) -> list[float]:
    """Return the λ of each stem: that of the longest name that it has, or is below."""
    for name in named:
        if not any(_is_below(stem.weight_name, name) for stem in stems):
            layers = ", ".join(stem.weight_name for stem in stems)
            raise TractError(f"lam names {name!r}, but the first layers are {layers}")
    names = [[name for name in named if _is_below(stem.weight_name, name)] for stem in stems]
    return [named.get(max(own, key=len, default=""), 0.1) for own in names]


def _is_below(name: str, above: str) -> bool:
    return not above or name == above or name.startswith(f"{above}.")


def _refuse(model: nn.Module, stems: Sequence[Stem], scope: Scope) -> None:
    """Refuse what would not be treated exactly, before anything is changed."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise UnsupportedStemError(DATA_PARALLEL)
    derived = next((stem.weight_name for stem in stems if stem.derived), None)
    if scope == "global" and derived:
        raise UnsupportedStemError(COMPUTED.format(derived))


def _attach(
    model: nn.Module, stems: Sequence[Stem], settings: Sequence[Settings]
) -> list[StemForward]:
    """Put the stand-ins in place; return those of the stems, of several of one stem the first."""
    forwards = []
    for stem, each in zip(stems, settings, strict=True):
        features = getattr(stem.module, "groups", 1), stem.in_features
        first = None
        for site in stem.sites:
            module = model.get_submodule(site.module_name)
            forward = StemForward(module, site.parameters, stem.weight_name, features, each, first)
            forward.attach()
            forwards.append(forward)
            first = first or forward
    attached = dict(stem_forwards(model))
    for name, module in list(model.named_modules()):
        if any(_is_below(stem_name, name) for stem_name in attached):
            ScriptedTwin(module).attach()
    inner, prefix = unwrap(model)
    ModelForward(inner, {name.removeprefix(prefix): f for name, f in attached.items()}).attach()
    return [forward for forward in forwards if forward.first is None]


def _log(stem: Stem, forward: StemForward) -> None:
    lam, damping = forward.settings.lam, forward.settings.damping
    relative = " × mean square" if damping == "relative" else ""
    said = [f"{stem.operation} {stem.geometry}".strip(), f"{stem.in_features} features"]
    said += ["frozen"] if forward.frozen else []
    _logger.info(
        f"TrAct λ={lam:g}{relative} on {stem.weight_name} ({', '.join(filter(None, said))})"
    )


def _check_module(caller: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module, got {type(model).__name__}")
