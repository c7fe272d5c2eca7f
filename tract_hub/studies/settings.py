"""Settings of the ``tract-hub`` commands: each dataclass *is* its command line (tyro reads it)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from tract_hub.config import Damping
from tract_hub.errors import SettingsError
from tract_hub.names import did_you_mean


@dataclass(frozen=True)
class Arm:
    """One way to train: what a study compares."""

    lam: float | None = None
    """Damping λ of TrAct; None trains with the ordinary gradient."""
    damping: Damping = "absolute"
    """What λ is relative to; see :func:`tract_hub.enable`."""
    rescaled: bool = False
    """Scale TrAct's gradient of each first layer to the norm of the ordinary one."""
    stem_lr: float = 1.0
    """Learning rate of the first layers, as a multiple of that of the other layers."""

    @property
    def name(self) -> str:
        """The arm as tables and pictures call it."""
        name = "ordinary" if self.lam is None else f"TrAct λ={self.lam:g}"
        name += " relative" if self.damping == "relative" else ""
        name += " rescaled" if self.rescaled else ""
        return name if self.stem_lr == 1 else f"{name}, first layer lr ×{self.stem_lr:g}"


ORDINARY = Arm()


@dataclass(frozen=True)
class Run:
    """One training: an arm, its length, its peak learning rate and its seed.

    The seed is that of the weights, the order of the images, augmentation and dropout.
    """

    arm: Arm
    epochs: int
    lr: float
    seed: int

    @property
    def key(self) -> tuple[str, int, float, int]:
        """What identifies the run's rows in the table of results."""
        return self.arm.name, self.epochs, self.lr, self.seed

    @property
    def slug(self) -> str:
        """A file name of the run's own."""
        text = f"{self.arm.name}-{self.epochs}-{self.lr:g}-{self.seed}".replace("λ", "lam")
        return re.sub(r"[^A-Za-z0-9.=]+", "-", text)


@dataclass(frozen=True)
class Compare:
    """Train a model with and without TrAct from the same seeds, and say whether TrAct helped.

    Without options: a narrow ResNet on scikit-learn's digits, in under 3 minutes on 2 cores. The
    same command again goes on where it was interrupted. Recipes (--recipe NAME; add --help to see
    its values as defaults): {recipes}.
    """

    recipe: str = "digits"
    """Starting values. `own` is taken where --model or --data is given without a recipe: timm's
    usual recipe for the model's kind."""
    model: str = "narrow-resnet18"
    """A model of this package, a name of timm, torchvision:NAME, a Hugging Face folder or hub id,
    or a function that returns a model: FILE.py:FUNCTION."""
    model_arg: tuple[str, ...] = ()
    """Arguments of timm's model or of the function, as depth=4."""
    pretrained: bool = False
    """Start from published weights (fine-tuning)."""
    data: str = "digits"
    """digits, a folder of images, parquet files, a saved data set, or a name on the hub."""
    image_size: int | None = None
    """Side of the images in pixels; else their own, or the model's."""
    channels: Literal[1, 3] | None = None
    """1 (grey) or 3 (RGB); else what the images are, RGB where they are mixed."""
    pixels: Literal["standard", "unit", "bytes"] = "standard"
    """Scale of the pixels: mean 0 and deviation 1; 0 to 1; or 0 to 255."""
    augment: Literal["none", "crop-flip"] = "none"
    """Random crops after padding by an eighth, and horizontal flips."""
    max_train: int | None = None
    """At most so many training images."""
    max_test: int | None = None
    """At most so many test images."""
    lam: tuple[float, ...] = (0.1,)
    """λ of TrAct, several by spaces. Each is compared; the verdict is about the first."""
    damping: tuple[Damping, ...] = ("absolute",)
    """absolute: λ itself; relative: λ times the mean square of the first layer's input."""
    rescaled: bool = False
    """Also train with TrAct's direction at the ordinary gradient's norm."""
    stem_lr: tuple[float, ...] = ()
    """Also train without TrAct, with the first layer's learning rate times this."""
    epochs: tuple[int, ...] = (3,)
    """Lengths of training; each is trained on its own. The verdict is about the last."""
    ordinary_epochs: tuple[int, ...] = ()
    """Further lengths, for ordinary training alone."""
    seeds: int = 12
    """Number of seeds. Each seed trains once with and once without TrAct."""
    first_seed: int = 0
    """The first of them."""
    lr: tuple[float, ...] = (0.4,)
    """Peak learning rate; none: timm's usual one for the model's kind. Of several, for each length,
    the one that ordinary training ends best with is taken, by --grid-seeds."""
    grid_seeds: int = 3
    """Number of seeds that choose among several learning rates."""
    optimizer: str = "sgd"
    """sgd (with Nesterov momentum), adamw, or any optimizer of timm; usual: timm's usual one for
    the model's kind, as are the values below where they are None."""
    momentum: float = 0.9
    """Of sgd and its kin."""
    weight_decay: float | None = 5e-4
    """As the optimizer defines it; not for biases and norms."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Of the learning rate, down to zero at the end."""
    warmup: float | None = 0.0
    """Epochs of linear warm-up."""
    label_smoothing: float | None = 0.0
    """Of the training loss."""
    batch_size: int = 64
    """Images in a step, all processes together."""
    device: str = "auto"
    """auto, cpu, cuda:1, mps …"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast's; fp16 needs a GPU."""
    channels_last: bool = False
    """Memory format of images and model."""
    compiled: bool = False
    """Compile the model by torch.compile."""
    threads: int | None = None
    """CPU threads; else torch's own choice."""
    workers: int | None = None
    """Processes that read images which do not fit in memory."""
    out: Path | None = None
    """Folder of the results; else tract-hub-runs/MODEL-DATA-…"""

    def __post_init__(self) -> None:
        for name in ("seeds", "batch_size", "grid_seeds", "lam", "stem_lr", "lr", "epochs"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            empty = name == "epochs" and not values
            if empty or not all(0 < number < float("inf") for number in values):
                shown = " ".join(map(str, values)) or "nothing"
                option = name.replace("_", "-")
                raise SettingsError(f"--{option} must be greater than 0 and finite, got {shown}")

    def arms(self) -> list[Arm]:
        """Return what is compared, ordinary training first."""
        arms = [ORDINARY]
        for rescaled in (False, True) if self.rescaled else (False,):
            arms += [Arm(lam, kind, rescaled) for kind in self.damping for lam in self.lam]
        return arms + [Arm(stem_lr=factor) for factor in self.stem_lr if factor != 1]

    def lengths(self, arm: Arm = ORDINARY) -> list[int]:
        """Return the lengths at which an arm is trained, in epochs, shortest first."""
        extra = self.ordinary_epochs if arm == ORDINARY else ()
        return sorted({*self.epochs, *extra})

    def seed_range(self) -> range:
        """Return the seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def names(self) -> list[str]:
        """Return model and data as results show them: of a path, the last part."""
        paths = (Path(name).expanduser() for name in (self.model, self.data))
        return [path.resolve().name if path.exists() else path.as_posix() for path in paths]

    def identity(self) -> dict[str, object]:
        """Return what all rows of one folder have in common, JSON-ready."""
        values = asdict(self) | dict(zip(("model", "data"), self.names(), strict=True))
        kept = {name: values[name] for name in values if name not in OF_A_ROW | OF_A_CALL}
        common: dict[str, object] = json.loads(json.dumps(kept))
        return common

    def folder(self) -> Path:
        """Return ``--out``, or a folder named after model, data and the other settings."""
        common = json.dumps(self.identity(), sort_keys=True)
        digest = hashlib.sha256(common.encode()).hexdigest()[:4]
        names = [re.sub(r"[^A-Za-z0-9.]+", "-", Path(name).name) for name in self.names()]
        return self.out or Path("tract-hub-runs") / "-".join([*names, digest])


# What may differ between commands that write to one folder: what a row says itself, and how fast
# and where the work is done.
OF_A_ROW = {"lam", "damping", "rescaled", "stem_lr", "epochs", "ordinary_epochs", "lr"}
OF_A_CALL = {"recipe", "seeds", "first_seed", "grid_seeds", "threads", "workers", "out"}


# The learning rates of the narrow models are those that ordinary training likes best for that
# length, of the grid in scripts/studies.
# Length and rate of the default by scripts/studies/default_study.py, from ordinary runs.
_DIGITS = Compare(threads=1, epochs=(3,), lr=(0.2,), seeds=40)
_CIFAR = Compare(
    data="uoft-cs/cifar10", augment="crop-flip", batch_size=128, epochs=(100,), seeds=5
)
_NARROW = replace(
    _CIFAR, batch_size=64, epochs=(10,), seeds=3, threads=1, channels_last=True, lr=(0.16,)
)
_VIT = replace(
    _CIFAR, optimizer="adamw", weight_decay=0.0, lr=(1e-3,), label_smoothing=0.1, warmup=5.0
)
_SMALL_VIT = replace(_VIT, batch_size=64, epochs=(10,), seeds=3, threads=1, warmup=1.0)
RECIPES: dict[str, Compare] = {
    "digits": _DIGITS,
    # What is None here is filled in where the model is known: `models.usual_recipe`.
    "own": Compare(
        augment="crop-flip",
        epochs=(10,),
        seeds=5,
        optimizer="usual",
        lr=(),
        weight_decay=None,
        warmup=None,
        label_smoothing=None,
    ),
    "narrow-resnet18": replace(_NARROW, model="narrow-resnet18"),
    "narrow-resnet18-bare": replace(_NARROW, model="narrow-resnet18-bare", lr=(0.04,)),
    "small-vit": replace(_SMALL_VIT, model="small-vit"),
    "conv-vit": replace(_SMALL_VIT, model="conv-vit"),
    # The settings of the paper's figures; 5e-4 is the custom for SGD, the paper states none.
    "cifar-resnet18": replace(
        _CIFAR, model="resnet18-small-images", optimizer="momentum", lr=(0.08,)
    ),
    "cifar-vit": replace(_VIT, model="cifar-vit"),
}
RECIPES = {name: replace(settings, recipe=name) for name, settings in RECIPES.items()}
Compare.__doc__ = (Compare.__doc__ or "").format(recipes=", ".join(RECIPES))


def recipe_of(arguments: Sequence[str]) -> Compare:
    """Return the starting values that a command line asks for."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    if "--recipe" in words:
        name = (words[words.index("--recipe") + 1 :] or [""])[0]
    else:
        name = "own" if {"--model", "--data"} & set(words) else "digits"
    if name not in RECIPES:
        raise SettingsError(f"there is no recipe {name!r}; {did_you_mean(name, RECIPES)}")
    return RECIPES[name]


@dataclass(frozen=True)
class Bench:
    """Measure what TrAct adds to a training step, beside the authors' package torch_tract.

    All ways to train take their steps in turns, so that a change in the machine's load meets all
    of them; what is shown are ratios of such turns.
    """

    cases: tuple[str, ...] = ()
    """Models to measure; else all for the device. A wrong name lists them."""
    device: str = "cpu"
    """cpu, cuda:1 …"""
    budget: float = 30.0
    """Seconds of a case; where its least number of turns, 3, needs more, a line says so."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast's."""
    channels_last: bool = False
    """Memory format of images and model, in all cases."""
    compiled: bool = False
    """Add a column: TrAct compiled over the ordinary model compiled. Compiling takes minutes."""
    memory: bool = True
    """Measure the peak memory of a 7 × 7 stem too."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("tract-hub-runs/bench")
    """Folder of bench.md and bench.json."""


@dataclass(frozen=True)
class Inspect:
    """Show the first layers of a model, and what TrAct adds to a training step there."""

    model: tyro.conf.Positional[str]
    """A name of timm, torchvision:NAME, or a model type, folder or config.json of Transformers."""
    batch_size: int = 128
    """Images in the step that the cost is a share of: the solve does not grow with them."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Audit:
    """Find the first layers of every model of a zoo, without weights; goes on where it stopped."""

    zoo: tyro.conf.Positional[Literal["timm", "torchvision", "huggingface"]]
    """Where the models are from."""
    only: str = "*"
    """A pattern of names, such as vit_*."""
    jobs: int = 1
    """Processes."""
    out: Path = Path("tract-hub-runs/audit")
    """Folder of ZOO.md and ZOO.json."""
