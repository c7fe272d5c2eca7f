"""The settings of a run: a YAML file, changed by key=value on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

SETTINGS = Path(__file__).parent / "settings"
EPOCH_COUNTS = ("warmup_epochs", "decay_epochs", "decay_milestones")


@dataclass(frozen=True)
class Recipe:
    """One training run; the names below `optimizer` and so on are timm's.

    `batch_size` is that of one step, all processes and accumulated batches together.
    """

    model: str
    epochs: int
    batch_size: int
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    transform: dict[str, Any]
    loss: str
    lam: float = 0.1
    scope: str = "rank"
    eval_crop: float = 0.875
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights: str | None = None
    stem: str = "published"
    data: str = ""
    classes: int = 1000
    repeats: int = 0
    mixup: dict[str, Any] = field(default_factory=dict)
    clip_grad: float | None = None
    smoke: dict[str, Any] = field(default_factory=dict)


def load_recipe(name: str, changes: list[str], smoke: bool, budget: float = 1.0) -> Recipe:
    """Read settings/NAME.yaml; `changes` are key=value, with dots for what is inside a key.

    `budget` is the share of all that is counted in epochs, the schedule included.
    """
    path = SETTINGS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SETTINGS.glob("*.yaml")))
        raise SystemExit(f"there is no recipe {name}: there is {known}")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values = _small(values) if smoke else values
    for change in changes:
        _set(values, *change.partition("=")[::2])
    unknown = set(values) - {f.name for f in fields(Recipe)}
    if unknown:
        raise SystemExit(f"a recipe has no {', '.join(sorted(unknown))}")
    if not budget > 0:
        raise SystemExit(f"the budget must be greater than 0, got {budget}")
    return Recipe(**_shortened(values, budget) if budget != 1 else values)


def _shortened(values: dict[str, Any], budget: float) -> dict[str, Any]:
    schedule = {
        key: _scaled(value, budget) if key in EPOCH_COUNTS else value
        for key, value in values["schedule"].items()
    }
    return {**values, "epochs": max(1, round(values["epochs"] * budget)), "schedule": schedule}


def _scaled(value: Any, budget: float) -> Any:
    return [v * budget for v in value] if isinstance(value, list) else value * budget


def _set(values: dict[str, Any], key: str, text: str) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = yaml.safe_load(text)


def _small(values: dict[str, Any]) -> dict[str, Any]:
    """The same run, on a model and images so small that a CPU makes it in seconds."""
    smoke = values["smoke"]
    return {
        **values,
        **smoke,
        "transform": {**values["transform"], **smoke["transform"]},
        "schedule": {**values["schedule"], "warmup_epochs": 0},
        **{"epochs": 1, "batch_size": 16, "classes": 4, "data": ""},
    }
