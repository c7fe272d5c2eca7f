"""Attach the TrAct gradient to a live model, take it off, say what is on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from tract_hub.config import Scope, TractConfig
from tract_hub.errors import TractError, TractWarning
from tract_hub.locator.locate import locate
from tract_hub.locator.named import named_stems
from tract_hub.locator.unwrap import unwrap
from tract_hub.method.forwards import ForwardScope, ForwardUses
from tract_hub.method.hooks import let_the_compiler_see_hooks
from tract_hub.method.interception import WeightGate, lookup
from tract_hub.method.step.ledger import Ledger
from tract_hub.method.step.step import Step
from tract_hub.stem import Stem

Model = TypeVar("Model", bound=nn.Module)
Owner = TypeVar("Owner", WeightGate, ForwardScope)


@dataclass(frozen=True)
class StemStatus:
    """The state of one first layer that TrAct is on.

    Attributes:
        weight_name: name of its parameter in ``model.named_parameters()``.
        lam: the damping λ.
        scope: whose rows the Gram matrix is taken over.
        rows: the share of the images that it is taken from; below 1 it is an estimate.
        frozen: whether the weight takes no gradient now.
        training: whether its module is in training mode; in eval mode it is the ordinary layer.

    """

    weight_name: str
    lam: float
    scope: Scope
    rows: float
    frozen: bool
    training: bool


def enable(
    model: Model,
    lam: float = 0.1,
    stems: Sequence[str | Stem] | None = None,
    scope: Scope = "rank",
    example_inputs: Any = None,
    rows: float = 1.0,
) -> Model:
    """Give the first layers of a model the exact TrAct gradient.

    After ``backward()``, the gradient of each first layer's weight is the ordinary one times
    (XᵀX / rows + λI)⁻¹, X being the layer's unfolded input. Everything else stays as it is: the
    class, the parameters, the state dict, every forward value and every other gradient.

    Args:
        model: any module; changed in place, by hooks.
        lam: the damping λ > 0, 0.1 for inputs standardised to mean 0 and deviation 1.
        stems: names of the layers or of their weights, where they should not be searched for.
        scope: ``"rank"``, the rows of this process's batch; ``"global"``, the rows of all
            processes and of all backwards of an optimizer's step.
        example_inputs: inputs to follow the pixels with, see ``locate``.
        rows: the share of the images that the Gram matrix is estimated from; at 1, the default,
            the gradient is exact, below it is not that of TrAct. See ``TractConfig``.

    Returns:
        The same object.

    Raises:
        ValueError: λ is not a finite positive number, the scope is unknown, or ``rows`` is not
            above 0 and at most 1, or below 1 with the scope ``"global"``.
        TypeError: the model is no module, or ``stems`` no list of names.
        TractError: there is no first layer that can be treated exactly; nothing was changed.

    """
    config = TractConfig(lam, scope, rows)
    _check_module("enable", model)
    present = status(model)
    if present:
        _adjust(model, config, present, stems, example_inputs)
        return model
    found = locate(model, example_inputs) if stems is None else named_stems(model, stems)
    for stem in found:
        for note in stem.notes:
            warnings.warn(f"TrAct on {stem.weight_name}: {note}", TractWarning, stacklevel=2)
    _attach(model, found, config)
    return model


def disable(model: Model) -> Model:
    """Take TrAct off a model: its hooks are as before ``enable``. Returns the same object.

    A forward that another thread runs meanwhile ends as it began.

    Raises:
        TypeError: the model is no module.

    """
    _check_module("disable", model)
    for _, module, scope in list(_owned(model, ForwardScope)):
        scope.detach(module)  # first: a forward that ends now would miss its gates
    for _, module, gate in list(_owned(model, WeightGate)):
        gate.detach(module)
    _forget_compiled()
    return model


def status(model: nn.Module) -> tuple[StemStatus, ...]:
    """Say on which first layers of a model TrAct is, sorted by name; empty where it is off.

    Raises:
        TypeError: the model is no module.

    """
    _check_module("status", model)
    found: dict[int, StemStatus] = {}
    for name, module, gate in _owned(model, WeightGate):
        weight = f"{name}.{gate.parameters[0]}".lstrip(".")
        frozen = not any(parameter.requires_grad for parameter in _weights(module, gate))
        state = StemStatus(weight, gate.lam, _scope(gate), gate.rows, frozen, module.training)
        found.setdefault(id(gate.forward_uses), state)
    return tuple(sorted(found.values(), key=lambda state: state.weight_name))


def stem_parameters(model: nn.Module) -> dict[ForwardUses, tuple[nn.Parameter, ...]]:
    """Return what holds the uses of each first layer that TrAct is on → what its weight is made of.

    The parameters are the layer's own objects, its bias not among them.
    """
    found: dict[ForwardUses, tuple[nn.Parameter, ...]] = {}
    for _, module, gate in _owned(model, WeightGate):
        parameters = (p for p in _weights(module, gate) if isinstance(p, nn.Parameter))
        found.setdefault(gate.forward_uses, tuple(parameters))
    return found


def _weights(module: nn.Module, gate: WeightGate) -> list[torch.Tensor]:
    """What a gate's weight is made of, as far as it is still there."""
    found = (lookup(module, name) for name in gate.parameters)
    return [tensor for tensor in found if tensor is not None]


def _check_module(caller: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module, got {type(model).__name__}")


def _attach(model: nn.Module, stems: Sequence[Stem], config: TractConfig) -> None:
    for _, module, scope in list(_owned(model, ForwardScope)):
        scope.detach(module)  # of layers that others have taken the place of
    every_use = []
    for stem in stems:
        groups = getattr(stem.module, "groups", 1)
        uses = ForwardUses(stem.weight_name, (groups, stem.in_features))
        every_use.append(uses)
        for site in stem.sites:
            gate = WeightGate(site.operation, site.parameters, config.lam, uses, rows=config.rows)
            gate.attach(model.get_submodule(site.module_name))
    names = _parameter_names(unwrap(model)[0])
    ForwardScope(every_use, parameters=names).attach(model)
    _set_scope(model, config.scope)
    let_the_compiler_see_hooks()
    _forget_compiled()


def _set_scope(model: nn.Module, scope: Scope) -> None:
    """Let the gates of a model sum their rows over a step, or not."""
    steps: dict[ForwardUses, Step | None] = {}
    for _, _, forwards in _owned(model, ForwardScope):
        forwards.step = _new_step(forwards) if scope == "global" else None
        steps |= dict.fromkeys(forwards.forward_uses, forwards.step)
    for _, _, gate in _owned(model, WeightGate):
        gate.step = steps[gate.forward_uses]


def _new_step(forwards: ForwardScope) -> Step:
    # imports FSDP, which takes half a second
    from tract_hub.integrations.synchronisers import find_synchroniser

    ledgers = {uses.weight_name: Ledger(*uses.shape) for uses in forwards.forward_uses}
    return Step(ledgers, find_synchroniser)


def _scope(gate: WeightGate) -> Scope:
    return "rank" if gate.step is None else "global"


def _adjust(
    model: nn.Module,
    config: TractConfig,
    present: Sequence[StemStatus],
    stems: Sequence[str | Stem] | None,
    example_inputs: Any,
) -> None:
    """A second ``enable``: the same stems, perhaps another λ."""
    names = [state.weight_name for state in present]
    wanted = _wanted(model, stems, example_inputs)
    if wanted is not None and wanted != names:
        raise TractError(
            f"TrAct is already on {', '.join(names)}, which is not {', '.join(wanted)}: "
            "call disable(model) first"
        )
    changed = [state for state in present if any(_changes(state, config))]
    if not changed:
        return
    new_scope = any(state.scope != config.scope for state in present)
    if new_scope:
        _refuse_part(model, names)
    where = ", ".join(state.weight_name for state in changed)
    what = ", ".join(dict.fromkeys(line for state in changed for line in _changes(state, config)))
    # First of all: a warning may be an error.
    warnings.warn(
        f"TrAct was already on {where}: {what}",
        TractWarning,
        stacklevel=3,
    )
    for _, _, gate in _owned(model, WeightGate):
        gate.lam, gate.rows = config.lam, config.rows
    if new_scope:
        _set_scope(model, config.scope)
    _forget_compiled()


def _wanted(
    model: nn.Module, stems: Sequence[str | Stem] | None, example_inputs: Any
) -> list[str] | None:
    """Name the weights that an ``enable`` is for; None where they are those it is on already."""
    if stems is not None:
        return sorted(stem.weight_name for stem in named_stems(model, stems))
    whole, _ = unwrap(model)
    scopes = [s for _, module, s in _owned(model, ForwardScope) if unwrap(module)[0] is whole]
    known = {uses for scope in scopes for uses in scope.forward_uses}
    on = {gate.forward_uses for _, _, gate in _owned(model, WeightGate)}
    if known == on and all(scope.parameters == _parameter_names(whole) for scope in scopes):
        return None
    # Enabled on a part, or layers were added or put in another's place since.
    return [stem.weight_name for stem in locate(model, example_inputs)]


def _parameter_names(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in model.named_parameters())


def _changes(before: StemStatus, after: TractConfig) -> Iterator[str]:
    if before.lam != after.lam:
        yield f"λ changed from {before.lam:g} to {after.lam:g}"
    if before.scope != after.scope:
        yield f"scope changed from {before.scope!r} to {after.scope!r}"
    if before.rows != after.rows:
        yield f"rows changed from {before.rows:g} to {after.rows:g}"


def _refuse_part(model: nn.Module, names: Sequence[str]) -> None:
    """Rows are summed from the forward of the whole model, which a part does not know."""
    known = {
        uses for _, _, forwards in _owned(model, ForwardScope) for uses in forwards.forward_uses
    }
    if any(gate.forward_uses not in known for _, _, gate in _owned(model, WeightGate)):
        raise TractError(
            f"TrAct on {', '.join(names)} was enabled on a model that this {type(model).__name__} "
            "is a part of: change the scope there"
        )


def _owned(model: nn.Module, kind: type[Owner]) -> Iterator[tuple[str, nn.Module, Owner]]:
    for name, module in model.named_modules():
        for hook in list(module._forward_pre_hooks.values()):
            owner = _owner(hook)
            if isinstance(owner, kind):
                yield name, module, owner


def _owner(hook: Any) -> WeightGate | ForwardScope | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, (WeightGate, ForwardScope)) else None


def _forget_compiled() -> None:
    """Drop graphs compiled before: torch.compile does not look for new hooks in them."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
