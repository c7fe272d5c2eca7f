"""The options of ``tract-hub compare``."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tract_hub.errors import SettingsError

# typer reads these at run time on Python 3.10, where `X | None` inside Annotated is a string.
Text = Optional[str]  # noqa: UP007, UP045
Whole = Optional[int]  # noqa: UP007, UP045
Real = Optional[float]  # noqa: UP007, UP045
Several = Optional[list[str]]  # noqa: UP007, UP045
MODEL, DATA, TRAINING, RUNNING = "Model", "Data", "Training", "Running"


def compare(
    recipe: Annotated[str, typer.Option(help="Named starting values: digits-vit or cifar-resnet.")]
    = "digits-vit",
    model: Annotated[Text, typer.Option(help="timm name, or a folder with a Hugging Face config.json.", rich_help_panel=MODEL)] = None,
    model_arg: Annotated[Several, typer.Option(help="key=value for timm.create_model; repeatable.", rich_help_panel=MODEL)] = None,
    stem: Annotated[Text, typer.Option(help="published, or cifar: 3 × 3 stride 1, max-pool kept.", rich_help_panel=MODEL)] = None,
    data: Annotated[Text, typer.Option(help="digits, an image folder, parquet, a saved dataset, or a hub name.", rich_help_panel=DATA)] = None,
    image_size: Annotated[Whole, typer.Option(help="Side in pixels [the images' own, or else the model's].", rich_help_panel=DATA)] = None,
    channels: Annotated[Whole, typer.Option(help="Convert the images to 1 (grey) or 3 (RGB) channels.", rich_help_panel=DATA)] = None,
    augment: Annotated[Text, typer.Option(help="none, or crop-flip.", rich_help_panel=DATA)] = None,
    max_train: Annotated[Whole, typer.Option(help="At most so many training images.", rich_help_panel=DATA)] = None,
    max_test: Annotated[Whole, typer.Option(help="At most so many test images.", rich_help_panel=DATA)] = None,
    lam: Annotated[Several, typer.Option(help="TrAct's λ; several (0.1,0.05 or repeated) are an arm each.", rich_help_panel=TRAINING)] = None,
    optimizer: Annotated[Text, typer.Option(help="adam, adamw, sgd, or a timm optimizer.", rich_help_panel=TRAINING)] = None,
    lr: Annotated[Real, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING)] = None,
    momentum: Annotated[Real, typer.Option(help="Of sgd.", rich_help_panel=TRAINING)] = None,
    weight_decay: Annotated[Real, typer.Option(help="As the optimizer defines it.", rich_help_panel=TRAINING)] = None,
    schedule: Annotated[Text, typer.Option(help="cosine, linear or constant.", rich_help_panel=TRAINING)] = None,
    warmup_epochs: Annotated[Real, typer.Option(help="Linear warm-up, in epochs.", rich_help_panel=TRAINING)] = None,
    label_smoothing: Annotated[Real, typer.Option(help="Of the training loss.", rich_help_panel=TRAINING)] = None,
    epochs: Annotated[Whole, typer.Option(help="Passes over the training images.", rich_help_panel=TRAINING)] = None,
    batch_size: Annotated[Whole, typer.Option(help="Images a step, all processes together.", rich_help_panel=TRAINING)] = None,
    seeds: Annotated[Several, typer.Option(help="0,1,2 or 0-4 or repeated: each trains every arm once.", rich_help_panel=TRAINING)] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=RUNNING)] = None,
    precision: Annotated[Text, typer.Option(help="fp32, bf16 or fp16.", rich_help_panel=RUNNING)] = None,
    workers: Annotated[Whole, typer.Option(help="Processes that read images.", rich_help_panel=RUNNING)] = None,
    out: Annotated[Optional[Path], typer.Option(help="Folder for runs and results [tract-hub-runs/compare-FINGERPRINT].", rich_help_panel=RUNNING)] = None,  # noqa: UP007, UP045
) -> None:  # fmt: skip
    """Train a model with and without TrAct from the same seeds, and show what TrAct gained.

    Without options: a small ViT on scikit-learn's digits, in under three minutes on two cores.
    A second call with the same options resumes: finished runs are kept, and not made again.
    """
    given = dict(locals())
    given.pop("recipe")
    given["model_args"] = _model_args(given.pop("model_arg") or []) or None
    given["seeds"] = _seeds(seeds) if seeds else None
    given["lams"] = _lams(given.pop("lam"))
    _run(recipe, given)


def _run(recipe: str, given: dict[str, Any]) -> None:
    from rich.console import Console

    from tract_hub.studies.recipes import build_settings

    # Bad options are refused before the seconds that the rest takes to import.
    settings = build_settings(recipe, given)
    from tract_hub.studies.compare import compare as run

    run(settings, Console(), Console(stderr=True))


def _model_args(pairs: list[str]) -> tuple[tuple[str, Any], ...]:
    return tuple(_pair(pair) for pair in pairs)


def _pair(pair: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not equals or not name.isidentifier():
        raise SettingsError(f"--model-arg must look like depth=4, got {pair!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _items(texts: list[str]) -> list[str]:
    return [item.strip() for text in texts for item in text.split(",") if item.strip()]


def _lams(texts: list[str] | None) -> tuple[float, ...] | None:
    if texts is None:
        return None
    try:
        return tuple(float(item) for item in _items(texts))
    except ValueError:
        raise SettingsError(f"--lam must be numbers such as 0.1, got {','.join(texts)!r}") from None


def _seeds(texts: list[str]) -> tuple[int, ...]:
    try:
        return tuple(seed for item in _items(texts) for seed in _range(item))
    except ValueError:
        raise SettingsError(
            f"--seeds must be whole numbers such as 0,1,2 or 0-4, got {','.join(texts)!r}"
        ) from None


def _range(item: str) -> range:
    first, dash, last = item.partition("-")
    return range(int(first), (int(last) if dash else int(first)) + 1)
