"""What a running script trains is what its optimizers hold."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Optimizers:
    """The optimizers that were made since this was installed, and the parameters they train.

    Args:
        notify: called after an optimizer was made.

    Attributes:
        made: whether there was any.
        waiting: those that have not made a step.

    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self.made = False
        self._notify = notify
        self._held: weakref.WeakKeyDictionary[Optimizer, list[weakref.ref[Tensor]]]
        self._held = weakref.WeakKeyDictionary()
        self.waiting: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def install(self) -> Callable[[], None]:
        """Take note of every optimizer made from now on; return what undoes this."""
        init = Optimizer.__init__

        @functools.wraps(init)
        def noted(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            init(optimizer, *args, **kwargs)
            self._held[optimizer] = [weakref.ref(p) for p in _parameters(optimizer)]
            self.waiting.add(optimizer)
            self.made = True
            self._notify()

        def uninstall() -> None:
            Optimizer.__init__ = init  # type: ignore[method-assign]

        Optimizer.__init__ = noted  # type: ignore[assignment, method-assign]
        return uninstall

    def trained(self) -> set[int]:
        """Return the ids of all parameters that an optimizer holds."""
        return {id(parameter) for optimizer in self._held for parameter in self._all(optimizer)}

    def of(self, parameter: Tensor) -> weakref.WeakSet[Optimizer]:
        """Return the optimizers that hold a parameter."""
        holders = [o for o in self._held if any(p is parameter for p in self._all(o))]
        return weakref.WeakSet(holders)

    def _all(self, optimizer: Optimizer) -> Iterator[Tensor]:
        """What it holds, and what it was made with: ZeRO puts shards in their place."""
        yield from _parameters(optimizer)
        for reference in self._held[optimizer]:
            parameter = reference()
            if parameter is not None:
                yield parameter


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether a step of it would do anything."""
    return any(parameter.grad is not None for parameter in _parameters(optimizer))


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
