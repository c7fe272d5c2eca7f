"""What one comparison was asked for, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tract_hub.errors import SettingsError
from tract_hub.names import shown_name

STEMS = ("published", "cifar")
MOST = 2**31 - 1
MOST_PROCESSES = 1024
LARGEST = 3.4e38  # a float32
AUGMENTATIONS = ("none", "crop-flip")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
NORMALISATIONS = ("standard", "unit", "bytes")
PATCH_NORMS = ("none", "patch", "dual")
STEM_OPTIMIZERS = ("same", "sgd")

# These choose which runs a comparison has and where they happen to be kept or read; a run's
# numbers do not depend on them, so runs made under other values of them can be shared.
NOT_PART_OF_A_RUN = (
    "recipe", "seeds", "lams", "out", "data", "device", "workers", "model", "save_weights",
    "weights",
)  # fmt: skip


@dataclass(frozen=True)
class CompareSettings:
    """All choices of a comparison, whether a recipe or a user made them.

    Args:
        recipe: the named recipe that the other values started from.
        model: a timm name, or a folder with a Hugging Face ``config.json``.
        model_args: keyword arguments for ``timm.create_model``.
        weights: a safetensors file that every run starts from, of the same model; what has another
            shape in it, as a head for other classes, starts fresh.
        stem: ``"published"`` as the model has it; ``"cifar"``: 3 × 3, stride 1, max-pool kept.
        patch_norm: ``"patch"`` standardises every patch before the patch embedding; ``"dual"`` is
            DualPatchNorm, a LayerNorm before and one after it. For a ViT of timm.
        data: ``"digits"``, a path (image folder, parquet, saved dataset), or a hub name.
        classes: keep only these, counted from 0 in the data's own order; None keeps all.
        image_size: side of the square images in pixels; None fits model and data.
        channels: 1 or 3 converts the images; None takes them as they are.
        normalise: ``"standard"``: mean 0 and deviation 1 by channel; ``"unit"``: pixels in
            [0, 1]; ``"bytes"``: in [0, 255].
        augment: what happens to training images.
        max_train: at most so many training images.
        max_test: at most so many test images.
        optimizer: a ``torch.optim`` name among adam, adamw, sgd, or a timm optimizer.
        lr: peak learning rate.
        momentum: for sgd and the timm optimizers that have one.
        weight_decay: as the optimizer defines it.
        stem_optimizer: ``"sgd"`` gives the first layers' weights SGD with this momentum.
        stem_lr: their own peak learning rate; None is ``lr``.
        schedule: the learning rate's course, step by step.
        warmup_epochs: linear warm-up before it, in epochs.
        label_smoothing: in [0, 1); of the training loss only.
        epochs: passes over the training images.
        batch_size: images in one step, all processes together.
        seeds: one run of every arm each.
        lams: λ of TrAct, one arm each; none trains the ordinary arm alone.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` …
        precision: arithmetic, through Accelerate's autocast.
        channels_last: memory format of model and images; faster for convolutions.
        threads: of the CPU, in one process; None leaves them to torch.
        workers: processes that read images; None chooses.
        save_weights: keep the weights of every finished run, as safetensors beside its record.
        out: where runs and results are written; None makes a folder named after the settings.

    Raises:
        SettingsError: a value makes no sense.

    """

    recipe: str
    model: str
    data: str
    optimizer: str
    lr: float
    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    lams: tuple[float, ...] = (0.1,)
    model_args: tuple[tuple[str, Any], ...] = ()
    weights: str | None = None
    stem: str = "published"
    patch_norm: str = "none"
    classes: tuple[int, ...] | None = None
    image_size: int | None = None
    channels: int | None = None
    normalise: str = "standard"
    augment: str = "none"
    max_train: int | None = None
    max_test: int | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    stem_optimizer: str = "same"
    stem_lr: float | None = None
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    device: str = "auto"
    precision: str = "fp32"
    channels_last: bool = False
    threads: int | None = None
    workers: int | None = None
    save_weights: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()
        _one_of("--stem", self.stem, STEMS)
        _one_of("--patch-norm", self.patch_norm, PATCH_NORMS)
        _one_of("--normalise", self.normalise, NORMALISATIONS)
        _one_of("--augment", self.augment, AUGMENTATIONS)
        _one_of("--stem-optimizer", self.stem_optimizer, STEM_OPTIMIZERS)
        _one_of("--schedule", self.schedule, SCHEDULES)
        _one_of("--precision", self.precision, PRECISIONS)
        if self.channels not in (None, 1, 3):
            raise SettingsError(f"--channels must be 1 or 3, got {self.channels}")

    def _check_numbers(self) -> None:
        _above_zero("--lr", self.lr)
        if self.stem_lr is not None:
            _above_zero("--stem-lr", self.stem_lr)
        for name in ("epochs", "batch_size", "image_size", "max_train", "max_test", "threads"):
            most = MOST_PROCESSES if name == "threads" else MOST
            _count(f"--{name.replace('_', '-')}", getattr(self, name), 1, most)
        _count("--workers", self.workers, 0, MOST_PROCESSES)
        for name in ("momentum", "label_smoothing"):
            _in_unit_interval(f"--{name.replace('_', '-')}", getattr(self, name))
        for name in ("weight_decay", "warmup_epochs"):
            _not_negative(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.warmup_epochs >= self.epochs:
            raise SettingsError(
                f"--warmup-epochs {self.warmup_epochs:g} leaves nothing of --epochs {self.epochs}: "
                "give fewer"
            )

    def _check_lists(self) -> None:
        if not self.seeds:
            raise SettingsError("--seeds needs at least one value, such as 0")
        for name, values in (("--seeds", self.seeds), ("--lam", self.lams)):
            if len(set(values)) != len(values):
                raise SettingsError(f"{name} has a value twice: {_listed(values)}; give each once")
        if self.classes is not None and (len(set(self.classes)) < 2 or min(self.classes) < 0):
            raise SettingsError(
                f"--classes needs two or more, counted from 0, got {_listed(self.classes)}"
            )
        for lam in self.lams:
            _above_zero("--lam", lam)
        if min(self.seeds) < 0 or max(self.seeds) >= 2**32:
            raise SettingsError(f"--seeds must lie in [0, 2^32), got {_listed(self.seeds)}")

    def of_a_run(self) -> dict[str, Any]:
        """Return the choices that a single run's numbers depend on, JSON-ready."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {name: value for name, value in named.items() if name not in NOT_PART_OF_A_RUN}
        return kept | {"model_args": dict(self.model_args), "model": shown_name(self.model)}


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(str(value) for value in values)


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingsError(f"{option} must be one of {', '.join(choices)}; got {value!r}")


def _count(option: str, value: int | None, least: int, most: int) -> None:
    if value is not None and value < least:
        raise SettingsError(f"{option} must be {least} or more, got {value}")
    if value is not None and value > most:
        raise SettingsError(f"{option} must be {most} or less, got {_short(value)}")


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**20 else "more than 10^20"


def _above_zero(option: str, value: float) -> None:
    _not_too_large(option, value)
    if not math.isfinite(value) or value <= 0:
        raise SettingsError(f"{option} must be a finite number greater than 0, got {value:g}")


def _not_too_large(option: str, value: float) -> None:
    if LARGEST < value < math.inf:
        raise SettingsError(f"{option} must be {LARGEST:g} or less, got {value:g}")


def _not_negative(option: str, value: float) -> None:
    _not_too_large(option, value)
    if not math.isfinite(value) or value < 0:
        raise SettingsError(f"{option} must be a finite number of 0 or more, got {value:g}")


def _in_unit_interval(option: str, value: float) -> None:
    if not 0 <= value < 1:
        raise SettingsError(f"{option} must lie in [0, 1), got {value:g}")
