"""Two optimizers that are one to everybody outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class TwoOptimizers(Optimizer):
    """One optimizer for the first layers and one for the rest, stepped together.

    The groups are the very dictionaries of the two, so a scheduler, a GradScaler or a wrapper that
    works with them works with both. ``state_dict`` is laid out as that of one optimizer with all
    groups, those of the rest first.

    Args:
        rest: holds everything but the first layers' weights.
        stem: holds these.

    """

    rest: Optimizer
    stem: Optimizer

    def __init__(self, rest: Optimizer, stem: Optimizer) -> None:
        # Optimizer.__init__ would keep groups and state of its own.
        self.__setstate__({"rest": rest, "stem": stem})

    def __getstate__(self) -> dict[str, Any]:
        return {"rest": self.rest, "stem": self.stem}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "defaults": dict(state["rest"].defaults)})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of both; adding to this list does nothing, changing a group does."""
        return [*self.rest.param_groups, *self.stem.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The state of every parameter of both; adding one here does nothing."""
        return {**self.rest.state, **self.stem.state}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that are no first layer's."""
        self.rest.add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step both; a closure is evaluated once."""
        loss: float | None = self.rest.step(closure)
        self.stem.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load each one's part by its own method: some keep state in other dtypes."""
        for check in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = check(self, state_dict) or state_dict
        groups, first = state_dict["param_groups"], len(self.rest.param_groups)
        for optimizer, part in ((self.rest, groups[:first]), (self.stem, groups[first:])):
            indices = {index for group in part for index in group["params"]}
            state = {i: values for i, values in state_dict["state"].items() if i in indices}
            optimizer.load_state_dict({"state": state, "param_groups": part})
        for tell in self._optimizer_load_state_dict_post_hooks.values():
            tell(self)

    def train(self) -> None:
        """Tell those that ask to be told, as schedule-free optimizers do."""
        self._tell("train")

    def eval(self) -> None:
        """See ``train``."""
        self._tell("eval")

    def _tell(self, mode: str) -> None:
        for optimizer in (self.rest, self.stem):
            getattr(optimizer, mode, lambda: None)()
