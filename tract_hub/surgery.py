"""Attach the TrAct gradient to a live model, take it off, say what is on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from tract_hub.adapters.locator import locate
from tract_hub.adapters.named import named_stems
from tract_hub.config import Scope, TractConfig
from tract_hub.errors import TractError, TractWarning
from tract_hub.method.interception import ForwardScope, ForwardUses, WeightGate
from tract_hub.stem import Stem

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class StemStatus:
    """The state of one first layer that TrAct is on.

    Attributes:
        weight_name: name of its parameter in ``model.named_parameters()``.
        lam: the damping λ.
        scope: whose rows the Gram matrix is taken over.
        frozen: whether the weight takes no gradient now.
        training: whether its module is in training mode; in eval mode it is the ordinary layer.

    """

    weight_name: str
    lam: float
    scope: Scope
    frozen: bool
    training: bool


def enable(
    model: Model,
    lam: float = 0.1,
    stems: Sequence[str | Stem] | None = None,
    scope: Scope = "rank",
    example_inputs: Any = None,
) -> Model:
    """Give the first layers of a model the exact TrAct gradient.

    After ``backward()``, the gradient of each first layer's weight is the ordinary one times
    (XᵀX / rows + λI)⁻¹, X being the layer's unfolded input. Everything else stays as it is: the
    class, the parameters, the state dict, every forward value and every other gradient.

    Args:
        model: any module; changed in place, by hooks.
        lam: the damping λ > 0, 0.1 for inputs standardised to mean 0 and deviation 1.
        stems: names of the layers or of their weights, where they should not be searched for.
        scope: ``"rank"``, the rows of this process's batch.
        example_inputs: inputs to follow the pixels with, see ``locate``.

    Returns:
        The same object.

    Raises:
        ValueError: λ is not a finite positive number, or the scope is unknown.
        TractError: there is no first layer that can be treated exactly; nothing was changed.

    """
    config = TractConfig(lam, scope)
    if config.scope == "global":
        raise TractError("scope='global' is not available in this version: pass scope='rank'")
    if not isinstance(model, nn.Module):
        raise TypeError(f"enable takes a torch.nn.Module, got {type(model).__name__}")
    present = status(model)
    if present:
        _adjust(model, config, present, stems)
        return model
    found = locate(model, example_inputs) if stems is None else named_stems(model, stems)
    for stem in found:
        for note in stem.notes:
            warnings.warn(f"TrAct on {stem.weight_name}: {note}", TractWarning, stacklevel=2)
    _attach(model, found, config)
    return model


def disable(model: Model) -> Model:
    """Take TrAct off a model: its hooks are as before ``enable``. Returns the same object."""
    for module in model.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in table.items() if _owner(hook) is not None]:
                del table[key]
                module._forward_hooks_always_called.pop(key, None)
    _forget_compiled()
    return model


def status(model: nn.Module) -> tuple[StemStatus, ...]:
    """Say on which first layers of a model TrAct is, sorted by name; empty where it is off."""
    found: dict[int, StemStatus] = {}
    for name, module, gate in _gates(model):
        weight = f"{name}.{gate.parameters[0]}".lstrip(".")
        parameters = [module.get_parameter(parameter) for parameter in gate.parameters]
        frozen = not any(parameter.requires_grad for parameter in parameters)
        state = StemStatus(weight, gate.lam, "rank", frozen, module.training)
        found.setdefault(id(gate.forward_uses), state)
    return tuple(sorted(found.values(), key=lambda state: state.weight_name))


def stem_parameters(model: nn.Module) -> dict[ForwardUses, tuple[nn.Parameter, ...]]:
    """Return what holds the uses of each first layer that TrAct is on → what its weight is made of.

    The parameters are the layer's own objects, its bias not among them.
    """
    found: dict[ForwardUses, tuple[nn.Parameter, ...]] = {}
    for _, module, gate in _gates(model):
        parameters = tuple(module.get_parameter(name) for name in gate.parameters)
        found.setdefault(gate.forward_uses, parameters)
    return found


def _attach(model: nn.Module, stems: Sequence[Stem], config: TractConfig) -> None:
    every_use = []
    for stem in stems:
        uses = ForwardUses(stem.weight_name)
        every_use.append(uses)
        for site in stem.sites:
            gate = WeightGate(site.operation, site.parameters, config.lam, uses)
            gate.attach(model.get_submodule(site.module_name))
    ForwardScope(every_use).attach(model)
    _forget_compiled()


def _adjust(
    model: nn.Module,
    config: TractConfig,
    present: Sequence[StemStatus],
    stems: Sequence[str | Stem] | None,
) -> None:
    """A second ``enable``: the same stems, perhaps another λ."""
    names = [state.weight_name for state in present]
    if stems is not None and sorted(s.weight_name for s in named_stems(model, stems)) != names:
        raise TractError(f"TrAct is already on {', '.join(names)}: call disable(model) first")
    if all(state.lam == config.lam for state in present):
        return
    for _, _, gate in _gates(model):
        gate.lam = config.lam
    _forget_compiled()
    before = ", ".join(dict.fromkeys(f"{state.lam:g}" for state in present))
    warnings.warn(
        f"TrAct was already on {', '.join(names)}: λ changed from {before} to {config.lam:g}",
        TractWarning,
        stacklevel=3,
    )


def _gates(model: nn.Module) -> Iterator[tuple[str, nn.Module, WeightGate]]:
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            owner = _owner(hook)
            if isinstance(owner, WeightGate):
                yield name, module, owner


def _owner(hook: Any) -> WeightGate | ForwardScope | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, (WeightGate, ForwardScope)) else None


def _forget_compiled() -> None:
    """Drop graphs compiled before: torch.compile does not look for new hooks."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
