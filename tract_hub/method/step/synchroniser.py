"""What TrAct needs to know of whatever averages a model's gradients over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tract_hub.method.step.ledger import Ledger


class Synchroniser:
    """One process alone; with process groups, one that averages in every backward.

    Args:
        groups: the process groups whose sums, one after the other, are over all processes.

    """

    def __init__(self, groups: Sequence[dist.ProcessGroup] = ()) -> None:
        self.groups = tuple(groups)

    def synchronises(self) -> bool:
        """Tell, when a backward starts, whether its gradients are averaged; asked once for each."""
        return True

    def discarded(self, ledger: Ledger) -> bool:
        """Tell whether the gradient that a ledger's step had so far was thrown away."""
        leaves = ledger.leaves
        if not leaves or any(leaf.grad is not None for leaf in leaves):
            ledger.forget_zeroed()
            return False
        return True


class GroupSum:
    """A sum over all processes, started at once and waited for when it is needed."""

    def __init__(self, parts: Sequence[Tensor], groups: Sequence[dist.ProcessGroup]) -> None:
        self._sizes = [part.numel() for part in parts]
        self._flat = torch.cat(list(parts))
        self._later = tuple(groups[1:])
        self._work = dist.all_reduce(self._flat, group=groups[0], async_op=True) if groups else None

    def result(self) -> tuple[Tensor, ...]:
        """Return the sums of the parts, as flat tensors."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            for group in self._later:
                dist.all_reduce(self._flat, group=group)
            self._later = ()
        parts: tuple[Tensor, ...] = self._flat.split(self._sizes)
        return parts
