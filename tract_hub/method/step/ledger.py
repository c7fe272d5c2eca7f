"""What the gradient of one weight is made of, over all backwards of one step.

The correction is linear in the gradient. So with S the sum of the ordinary gradients, G that of
the Gram matrices over all rows, and C the sum of what the gate has returned so far, the gate that
returns S · (G / rows + λI)⁻¹ − C leaves the gradient of all rows at once in ``.grad``, or in what
a wrapper averages over processes: both only add up.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tract_hub.method.gram.matrix import Gram
from tract_hub.method.gram.precision import widest_dtype
from tract_hub.method.solve.divide import divide_by_gram

Settled = tuple[Tensor, Tensor, Gram]
"""A step's ordinary gradient and TrAct's, in this process, and the Gram matrix of all."""


class Ledger:
    """The sums of one weight since its optimizer last stepped.

    Args:
        groups: how many Gram matrices the weight has.
        features: n, the side of each.

    """

    def __init__(self, groups: int, features: int) -> None:
        self.shape = torch.Size((groups, features, features))
        self.holders: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._leaves: list[weakref.ref[Tensor]] = []
        self.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        groups, features, _ = self.shape
        return Ledger, (groups, features)  # a copy of the model begins a step of its own

    def clear(self) -> None:
        """Begin a step."""
        self.sums: Tensor | None = None  # the Gram matrices and, last, their rows; widest dtype
        self.eps = 0.0  # the rounding unit of the products in the sums
        self.raw: Tensor | None = None  # S
        self.returned: Tensor | None = None  # C
        self.holds = False  # whether a gradient was kept back that none has returned since

    def meet(self, leaves: Iterable[Tensor]) -> None:
        """Remember the tensors that take the gradient."""
        self._leaves = [weakref.ref(leaf) for leaf in leaves]

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that took the gradient when it last came."""
        return [leaf for leaf in (known() for known in self._leaves) if leaf is not None]

    def add(self, gram: Gram) -> None:
        """Count the rows of one use of the weight."""
        wide = widest_dtype(gram.total.device)
        self.shape = gram.total.shape
        rows = torch.full((1,), float(gram.rows), dtype=wide, device=gram.total.device)
        sums = torch.cat([gram.total.detach().to(wide).flatten(), rows])
        self.sums = sums if self.sums is None else self.sums + sums.to(self.sums.device)
        self.eps = max(self.eps, gram.eps)

    def packed(self, device: torch.device) -> Tensor:
        """Return the sums, zeros where nothing was counted: (groups · n² + 1,)."""
        if self.sums is not None:
            return self.sums.to(device)
        groups, features, _ = self.shape
        size = groups * features * features + 1
        return torch.zeros(size, dtype=widest_dtype(device), device=device)

    def hold(self, gradient: Tensor) -> Tensor:
        """Keep a gradient for a later backward of the step; return zeros.

        The ordinary gradient would do as well, were it not to be taken off again: where the
        corrected one is a hundred times smaller, that would cost two digits.
        """
        self.raw, self.holds = self._with(gradient).detach(), True
        return torch.zeros_like(gradient)

    def settle(self, gradient: Tensor, sums: Tensor, lam: float) -> tuple[Tensor, Settled]:
        """Return what makes the step's gradient complete, and that gradient.

        Args:
            gradient: the ordinary gradient of this backward.
            sums: what ``packed`` gave, summed over all processes.
            lam: the damping λ.

        """
        raw = self._with(gradient)
        moment = (sums[:-1] / sums[-1].clamp_min(1)).view(self.shape)
        gram = Gram(moment, 1, self.eps)
        due = divide_by_gram(raw, gram, lam)
        answer = (due if self.returned is None else due - self.returned).to(gradient.dtype)
        returned = answer.detach().to(raw.dtype)
        self.raw, self.holds = raw.detach(), False
        self.returned = returned if self.returned is None else self.returned + returned
        return answer, (raw, due, gram)

    def forget_zeroed(self) -> None:
        """Begin a step if the gradient was set to zero in place; does not wait for the device."""
        gradients = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        if self.sums is None or self.raw is None or self.returned is None or not gradients:
            return
        kept = torch.stack([gradient.ne(0).any() for gradient in gradients]).any()
        kept = kept | self.returned.eq(0).all()
        self.sums, self.raw, self.returned = (
            torch.where(kept.to(part.device), part, torch.zeros_like(part))
            for part in (self.sums, self.raw, self.returned)
        )

    def _with(self, gradient: Tensor) -> Tensor:
        wide = gradient.to(widest_dtype(gradient.device))
        return wide if self.raw is None else self.raw + wide
