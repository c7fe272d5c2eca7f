"""A study: what is trained, as its YAML file and the command line say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

SETTINGS = Path(__file__).parent / "settings"
DATA = Path(__file__).parent / "data.yaml"
# The recipes of tract-hub compare that a CPU can train, in place of the paper's own.
SMALLER = {
    "cifar-resnet": "narrow-resnet",
    "cifar-resnet-adam": "narrow-resnet-adam",
    "cifar-vit": "narrow-vit",
}


@dataclass(frozen=True)
class Data:
    """Images that studies train on.

    Args:
        title: as results show it.
        name: on the hub, or of what is meant.
        fetch: the command that gets them.
        layout: what they look like on disk.

    """

    title: str
    name: str
    fetch: str
    layout: str


@dataclass(frozen=True)
class Part:
    """One training with some of its options, in every arm and from every seed.

    Args:
        name: as tables show it.
        published: epochs at full length: the paper's, or the smaller study's own.
        epochs: that are trained here: the same, or a shortened number.
        lams: one arm each, beside the ordinary one.
        seeds: each trains every arm.
        options: for ``tract-hub compare``, or for the recipe, by name.

    """

    name: str
    published: int
    epochs: int
    lams: tuple[float, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Where its runs lie: named after all that they have in common, so studies share them."""
        words = [f"{key}-{value}" for key, value in sorted(self.options.items()) if key != "recipe"]
        name = "-".join([self.options["recipe"], *words, f"{self.epochs}-epochs"])
        return re.sub(r"[^\w.=-]+", "_", name)


@dataclass(frozen=True)
class Study:
    """One figure or table of the paper, or a question of ours.

    Args:
        name: of its file.
        title: what is studied.
        by: ``"compare"`` trains with ``tract-hub compare``, ``"recipe"`` with
            ``scripts/recipes/train.py``.
        parts: what is trained.
        paper: lines on what the paper reports, in words.
        against: the part whose ordinary arm the others are set against too, or None.
        data: what it trains on.
        budget: by how much all parts were shortened; 1 is the paper's length.
        reduced: whether models and data are smaller than the paper's.
        notes: what differs from the paper, in words.
        others: further options that every command was given.

    """

    name: str
    title: str
    by: Literal["compare", "recipe"]
    parts: tuple[Part, ...]
    data: Data
    paper: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    against: str | None = None
    budget: float = 1.0
    reduced: bool = False
    others: tuple[str, ...] = ()

    @property
    def scale(self) -> str:
        """How far this is from the paper's own training, in words."""
        whose = "the paper's" if self.paper else "the study's"
        size = "smaller models and fewer images" if self.reduced else f"{whose} models and data"
        if self.reduced:  # the budget is no share of the paper's epochs
            lengths = sorted({part.epochs for part in self.parts})
            length = f"{' and '.join(map(str, lengths))} epochs"
        else:
            length = "full length" if self.budget == 1 else f"{self.budget:.1%} of {whose} epochs"
        others = f", all with {' '.join(self.others)}" if self.others else ""
        return f"{size}, {length}{others}"


@dataclass(frozen=True)
class _File:
    """The keys of a study's YAML file."""

    title: str
    parts: dict[str, dict[str, Any]]
    epochs: list[int]
    seeds: list[int]
    data: str
    by: Literal["compare", "recipe"] = "compare"
    lams: list[float] = field(default_factory=lambda: [0.1])
    paper: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    against: str | None = None
    reduced: dict[str, Any] = field(default_factory=dict)
    """What else differs in the smaller study: epochs, seeds, lams, notes, options of parts."""


def known() -> list[str]:
    """Return the names of all studies."""
    return sorted(path.stem for path in SETTINGS.glob("*.yaml"))


def load_study(
    name: str,
    budget: float = 1.0,
    reduced: bool = False,
    seeds: Sequence[int] | None = None,
    data_title: str | None = None,
) -> Study:
    """Read a study and shorten it.

    Args:
        name: one of :func:`known`.
        budget: a share of the epochs, for all arms alike; at least one is trained.
        reduced: take the file's smaller models, data, lengths and seeds.
        seeds: instead of the file's.
        data_title: how results call the data, if not as the file does.

    Raises:
        ValueError: no such study, or nothing smaller is described, or a key is unknown.

    """
    path = SETTINGS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no study {name}: there is {', '.join(known())}")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = set(values) - {f.name for f in fields(_File)}
    if unknown:
        raise ValueError(f"{path.name}: a study has no {', '.join(sorted(unknown))}")
    file = _File(**values)
    if reduced and not file.reduced:
        raise ValueError(f"{name} has nothing smaller to train; shorten it with --budget")
    smaller = file.reduced if reduced else {}
    data = Data(**yaml.safe_load(DATA.read_text(encoding="utf-8"))[file.data])
    return Study(
        name,
        file.title.format(data=data_title or data.title),
        file.by,
        _parts(file, smaller, budget, seeds),
        data,
        tuple(file.paper),
        (*file.notes, *smaller.get("notes", [])),
        file.against,
        budget,
        reduced,
    )


def _parts(
    file: _File, smaller: dict[str, Any], budget: float, seeds: Sequence[int] | None
) -> tuple[Part, ...]:
    """Return every part at every length; what is given nearer to a part wins."""
    made = []
    for name, own in file.parts.items():
        options = (_smaller(own) | smaller.get("parts", {}).get(name, {})) if smaller else {**own}
        lams = options.pop("lams", smaller.get("lams", file.lams))
        lengths = options.pop("epochs", smaller.get("epochs", file.epochs))
        which = tuple(options.pop("seeds", seeds or smaller.get("seeds", file.seeds)))
        for length in lengths:
            epochs = max(1, round(length * budget))
            at_length = {key: _at(value, length) for key, value in options.items()}
            made.append(Part(name, length, epochs, tuple(lams), which, at_length))
    return tuple(made)


def _smaller(options: dict[str, Any]) -> dict[str, Any]:
    """Return a part's options with the smaller recipe, which has its own learning rate."""
    kept = {key: value for key, value in options.items() if key not in ("lr", "stem-lr")}
    return kept | {"recipe": SMALLER[options["recipe"]]}


def _at(value: Any, length: int) -> Any:
    """Return an option's value at one length: some learning rates depend on it."""
    return value[length] if isinstance(value, dict) else value
