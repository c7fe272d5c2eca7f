"""Settings of the first layers' own in an optimizer: learning rate, weight decay, update rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from tract_hub.config import is_finite_number
from tract_hub.errors import TractError
from tract_hub.integrations.trainer.two_optimizers import TwoOptimizers

StemOptimizer = Literal["sgd"] | tuple[type[Optimizer], dict[str, Any]]

Group = dict[str, Any]
"""One of ``optimizer.param_groups``."""


@dataclass(frozen=True)
class StemGroup:
    """What the weights of the first layers have of their own; None is what the others have.

    Raises:
        ValueError: the optimizer is neither ``"sgd"`` nor a class and its keyword arguments; the
            learning rate or the weight decay is no finite number of 0 or more.

    """

    lr: float | None = None
    weight_decay: float | None = None
    optimizer: StemOptimizer | None = None

    def __post_init__(self) -> None:
        if not _is_stem_optimizer(self.optimizer):
            raise ValueError(
                "stem_optimizer must be 'sgd' or a torch.optim.Optimizer class and a dict of its "
                f"keyword arguments, such as (torch.optim.SGD, {{}}); got {self.optimizer!r}"
            )
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (is_finite_number(value) and value >= 0):
                raise ValueError(f"stem_{name} must be a finite number of 0 or more, got {value!r}")

    def separate(self, optimizer: Optimizer, weights: Iterable[Tensor]) -> Optimizer:
        """Move the first layers' weights to groups of their own, where asked for.

        Args:
            optimizer: has not stepped yet; changed in place.
            weights: of the first layers.

        Returns:
            The optimizer, or one that it is a part of.

        Raises:
            TractError: the optimizer does not hold these weights, or theirs cannot be made.

        """
        if self == StemGroup():
            return optimizer
        groups = [self._own(group) for group in _take(optimizer, {id(w) for w in weights})]
        if not groups:
            raise TractError(
                f"{type(optimizer).__name__} has no group with the first layer's weight, which is "
                "frozen or treated apart: leave out stem_lr, stem_weight_decay and stem_optimizer"
            )
        if self.optimizer is None:
            for group in groups:
                optimizer.add_param_group(group)
            return optimizer
        return TwoOptimizers(optimizer, self._make(groups))

    def _own(self, group: Group) -> Group:
        own = {"lr": self.lr, "weight_decay": self.weight_decay}
        return group | {name: value for name, value in own.items() if value is not None}

    def _make(self, groups: list[Group]) -> Optimizer:
        cls: type[Optimizer] = torch.optim.SGD
        settings: dict[str, Any] = {"momentum": 0.9}
        if isinstance(self.optimizer, tuple):
            cls, settings = self.optimizer
        common = ("params", "lr", "weight_decay")
        own = [{name: group[name] for name in common} for group in groups]
        try:
            return cls(own, **settings)
        except Exception as error:  # optimizers check their arguments in ways of their own
            raise TractError(
                f"stem_optimizer: {cls.__name__} cannot be made with {settings} ({error}): pass "
                "keyword arguments that it has"
            ) from error


def _is_stem_optimizer(value: Any) -> bool:
    if not isinstance(value, tuple):
        return value is None or (isinstance(value, str) and value == "sgd")
    if len(value) != 2:
        return False
    cls, settings = value
    return isinstance(cls, type) and issubclass(cls, Optimizer) and isinstance(settings, dict)


def _take(optimizer: Optimizer, wanted: set[int]) -> list[Group]:
    """Remove parameters from their groups; return them in groups with the same settings."""
    taken = []
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if id(p) in wanted]
        if parameters:
            group["params"] = [p for p in group["params"] if id(p) not in wanted]
            taken.append(group | {"params": parameters})
    return taken
