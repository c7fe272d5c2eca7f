"""The options of ``tract-hub compare``."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tract_hub.errors import SettingsError

MOST_NUMBERS = 10_000
ARMS, MODEL, DATA = "What is compared", "Model", "Data"
TRAINING, RUNNING, RESULTS = "Training", "Running", "Results"


def _option(text: str, panel: str) -> Any:
    return typer.Option(help=text, rich_help_panel=panel)


def compare(
    recipe: Annotated[
        str, typer.Option(help="Starting values, such as cifar-resnet.", rich_help_panel=ARMS)
    ] = "digits-vit",
    lam: Annotated[
        list[str] | None, _option("λ of TrAct, as 0.1,0.05: an arm each; or none.", ARMS)
    ] = None,
    seeds: Annotated[
        list[str] | None, _option("0,1,2 or 0-4: each trains every arm once.", ARMS)
    ] = None,
    model: Annotated[str | None, _option("timm name, or a Hugging Face folder.", MODEL)] = None,
    model_arg: Annotated[
        list[str] | None, _option("depth=4 for timm's model; repeatable.", MODEL)
    ] = None,
    weights: Annotated[str | None, _option("Start from this safetensors file.", MODEL)] = None,
    stem: Annotated[str | None, _option("published; or cifar: 3 × 3, stride 1.", MODEL)] = None,
    patch_norm: Annotated[
        str | None, _option("none, patch, or dual (DualPatchNorm).", MODEL)
    ] = None,
    data: Annotated[
        str | None, _option("digits, a path (images, parquet …), or hub name.", DATA)
    ] = None,
    classes: Annotated[str | None, _option("Only these of the data's: 0-4 or 0,3,7.", DATA)] = None,
    image_size: Annotated[
        int | None, _option("Side in pixels; else what data and model have.", DATA)
    ] = None,
    channels: Annotated[int | None, _option("Convert images to 1 (grey) or 3 (RGB).", DATA)] = None,
    normalise: Annotated[
        str | None, _option("standard; unit: [0, 1]; or bytes: [0, 255].", DATA)
    ] = None,
    augment: Annotated[str | None, _option("none, or crop-flip.", DATA)] = None,
    max_train: Annotated[int | None, _option("At most so many training images.", DATA)] = None,
    max_test: Annotated[int | None, _option("At most so many test images.", DATA)] = None,
    optimizer: Annotated[
        str | None, _option("adam, adamw, sgd, or a timm optimizer.", TRAINING)
    ] = None,
    lr: Annotated[float | None, _option("Peak learning rate.", TRAINING)] = None,
    momentum: Annotated[
        float | None, _option("Of sgd, and of timm's that have one.", TRAINING)
    ] = None,
    weight_decay: Annotated[float | None, _option("As the optimizer defines it.", TRAINING)] = None,
    stem_optimizer: Annotated[
        str | None, _option("same, or sgd for first layers' weights.", TRAINING)
    ] = None,
    stem_lr: Annotated[
        float | None, _option("The first layers' own peak learning rate.", TRAINING)
    ] = None,
    schedule: Annotated[str | None, _option("cosine, linear or constant.", TRAINING)] = None,
    warmup_epochs: Annotated[float | None, _option("Linear warm-up, in epochs.", TRAINING)] = None,
    label_smoothing: Annotated[float | None, _option("Of the training loss.", TRAINING)] = None,
    epochs: Annotated[int | None, _option("Passes over the training images.", TRAINING)] = None,
    batch_size: Annotated[
        int | None, _option("Images a step, all processes together.", TRAINING)
    ] = None,
    device: Annotated[str | None, _option("auto, cpu, cuda:1, mps …", RUNNING)] = None,
    precision: Annotated[str | None, _option("fp32, bf16 or fp16.", RUNNING)] = None,
    channels_last: Annotated[bool | None, _option("Memory format of images.", RUNNING)] = None,
    threads: Annotated[int | None, _option("CPU threads of a process.", RUNNING)] = None,
    workers: Annotated[int | None, _option("Processes reading images.", RUNNING)] = None,
    out: Annotated[
        Path | None, _option("Their folder; else one named after the settings.", RESULTS)
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write report.html too.", rich_help_panel=RESULTS)
    ] = False,
    save_weights: Annotated[
        bool,
        typer.Option("--save-weights", help="Keep every run's weights.", rich_help_panel=RESULTS),
    ] = False,
) -> None:
    """Train a model with and without TrAct from the same seeds, and show what TrAct gained.

    Without options: a small ViT on scikit-learn's digits, in under three minutes on two cores.
    The same command again goes on from the runs that are finished.
    """
    given = dict(locals())
    for name in ("recipe", "report"):
        given.pop(name)
    given["model_args"] = _model_args(given.pop("model_arg") or []) or None
    given["seeds"] = _numbers("--seeds", seeds) if seeds else None
    given["classes"] = _numbers("--classes", [classes]) if classes else None
    given["lams"] = _lams(given.pop("lam"))
    _run(recipe, given, report)


def _run(recipe: str, given: dict[str, Any], report: bool) -> None:
    from rich.console import Console

    from tract_hub.studies.compare.recipes import build_settings

    # Bad options are refused before the seconds that the rest takes to import.
    settings = build_settings(recipe, given)
    from tract_hub.studies.compare.run import compare as run

    run(settings, Console(), Console(stderr=True), report)


def _model_args(pairs: list[str]) -> tuple[tuple[str, Any], ...]:
    return tuple(_pair(pair) for pair in pairs)


def _pair(pair: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not equals or not name.isidentifier():
        raise SettingsError(f"--model-arg must look like depth=4, got {pair!r}")
    try:
        literal = ast.literal_eval(value)
        json.dumps(literal, allow_nan=False)  # results name every setting
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value
    return name, literal


def _items(texts: list[str]) -> list[str]:
    return [item.strip() for text in texts for item in text.split(",") if item.strip()]


def _lams(texts: list[str] | None) -> tuple[float, ...] | None:
    if texts is None:
        return None
    if texts == ["none"]:
        return ()
    if not _items(texts):
        raise SettingsError("--lam needs at least one value, or none")
    try:
        return tuple(float(item) for item in _items(texts))
    except ValueError:
        raise SettingsError(f"--lam must be numbers such as 0.1, got {','.join(texts)!r}") from None


def _numbers(option: str, texts: list[str]) -> tuple[int, ...]:
    try:
        return tuple(number for item in _items(texts) for number in _range(option, item))
    except ValueError:
        raise SettingsError(
            f"{option} must be whole numbers such as 0,1,2 or 0-4, got {','.join(texts)!r}"
        ) from None


def _range(option: str, item: str) -> range:
    first, dash, last = item.partition("-")
    begin, end = int(first), (int(last) if dash else int(first)) + 1
    if end - begin > MOST_NUMBERS:
        raise SettingsError(f"{option} {item} are more than {MOST_NUMBERS} numbers: give fewer")
    return range(begin, end)
