"""What a run leaves behind."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 2
"""Of what is kept of a run; other formats are refused, for want of what this one has."""


@dataclass(frozen=True)
class Arm:
    """One way of training: ordinary (λ is None), or TrAct with a λ."""

    lam: float | None = None

    def __str__(self) -> str:
        return "ordinary" if self.lam is None else f"TrAct λ={self.lam:g}"

    @property
    def slug(self) -> str:
        """The arm as a part of a file name."""
        return "ordinary" if self.lam is None else f"tract-{self.lam!r}"


ORDINARY = Arm()


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of one run.

    Args:
        epoch: counted from 1.
        train_loss: mean over the epoch's batches, while training.
        test_loss: mean cross-entropy over the test images, after the epoch.
        accuracy: share of the test images classified right, after the epoch.
        seconds: wall time of the training part.

    """

    epoch: int
    train_loss: float
    test_loss: float
    accuracy: float
    seconds: float

    def finite(self) -> bool:
        """Tell whether training still made sense."""
        return math.isfinite(self.train_loss) and math.isfinite(self.test_loss)


@dataclass(frozen=True)
class Filters:
    """Some rows of a first layer's weight, from the start of training to its end.

    Args:
        weight: the parameter's name.
        rows: which of its output channels, the same in every arm.
        epochs: after which the snapshots were taken, in order; 0 is the start.
        values: one item a snapshot: nested lists of the rows' values, as the weight is shaped.

    """

    weight: str
    rows: tuple[int, ...]
    epochs: tuple[int, ...]
    values: list[Any]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Filters:
        """Return what ``asdict`` and JSON made of it; errors as for a ``RunRecord``."""
        filters = cls(**{**data, "rows": tuple(data["rows"]), "epochs": tuple(data["epochs"])})
        if len(filters.epochs) != len(filters.values):
            raise ValueError("there must be as many snapshots as epochs")
        return filters


@dataclass(frozen=True)
class RunRecord:
    """One finished run: an arm, a seed, all epochs.

    Args:
        arm: how it was trained.
        seed: of its weights, batches and augmentation.
        epochs: in order; fewer than asked for when it diverged.
        diverged_at: the epoch with a loss that was not finite, or None.
        start: digest of the initial weights and buffers.
        batches: digest of all training pixels and labels in the order in which they were seen.
        filters: of the first layer, while it was trained.

    """

    arm: Arm
    seed: int
    epochs: tuple[EpochRecord, ...]
    diverged_at: int | None
    start: str
    batches: str
    filters: Filters

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON types; losses that are no number become None."""
        data: dict[str, Any] = _finite_or_none(asdict(self))
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunRecord:
        """Return the record that :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: the data are something else.

        """
        return cls(
            arm=Arm(**data["arm"]),
            seed=int(data["seed"]),
            epochs=tuple(EpochRecord(**_or_nan(epoch)) for epoch in data["epochs"]),
            diverged_at=data["diverged_at"],
            start=data["start"],
            batches=data["batches"],
            filters=Filters.from_json(data["filters"]),
        )


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _or_nan(epoch: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in epoch.items()}
