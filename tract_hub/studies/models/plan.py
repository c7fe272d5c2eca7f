"""Any timm or Hugging Face image classifier, fitted to the images at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tract_hub.errors import ModelError, first_line
from tract_hub.names import did_you_mean, shown_name
from tract_hub.studies.images.splits import Source
from tract_hub.studies.models.huggingface import huggingface_builder
from tract_hub.studies.models.patch_norm import add_patch_norm
from tract_hub.studies.models.stems import adapt_stem
from tract_hub.studies.models.weights import load_weights
from tract_hub.studies.settings import CompareSettings

# Gives a fresh model for images of so many pixels a side; None: the model's own size.
Builder = Callable[[int | None], nn.Module]


@dataclass(frozen=True)
class ModelPlan:
    """How to make the model of a comparison again and again.

    Args:
        name: as results show it.
        size: side of its square input images, in pixels.
        channels: of its input images.
        build: makes a fresh model from the current random state, on the CPU.
        remarks: what was fitted, in words.

    """

    name: str
    size: int
    channels: int
    build: Callable[[], nn.Module]
    remarks: tuple[str, ...] = ()

    def example(self) -> Tensor:
        """Return two blank images of the right shape."""
        return torch.zeros(2, self.channels, self.size, self.size)


def logits_of(output: Any) -> Tensor:
    """Return the class scores in what a model returned, batch × classes."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"the model returns {type(output).__name__}, not class scores; choose a classifier"
        )
    return logits


def plan_model(settings: CompareSettings, source: Source) -> ModelPlan:
    """Find the model and an image size that it runs at.

    Without ``image_size``, the images' own size is tried first, then the model's own.

    Args:
        settings: names the model.
        source: gives the channels, the classes and the native size.

    Raises:
        ModelError: no such model, or it does not run on these images.

    """
    builder = _builder(settings, source)
    native = source.native_size()
    sizes = [settings.image_size] if settings.image_size else [native, None] if native else [None]
    problems: list[str] = []
    for size in sizes:
        try:
            return _plan_at(size, builder, settings, source)
        except ModelError as error:
            problems.append(str(error))
    raise ModelError(problems[-1])


def _plan_at(
    size: int | None, builder: Builder, settings: CompareSettings, source: Source
) -> ModelPlan:
    name = shown_name(settings.model)
    state = torch.random.get_rng_state()
    model = _attempt(lambda: builder(size), f"{name} cannot be built")
    size = size or _own_size(model, name)
    _probe(model, size, name, source)
    remarks = _adapt(model, settings, name)
    if remarks:
        _probe(model, size, name, source)
    if size != source.native_size():
        remarks.append(f"images resized to {size} × {size}")
    torch.random.set_rng_state(state)

    def build() -> nn.Module:
        fresh = builder(size)
        _adapt(fresh, settings, name)
        return fresh

    return ModelPlan(name, size, source.channels, build, tuple(remarks))


def _adapt(model: nn.Module, settings: CompareSettings, name: str) -> list[str]:
    """Make the asked changes to a fresh model; return them in words."""
    remarks = []
    if settings.stem != "published":
        remarks.append(adapt_stem(model, name))
    if settings.patch_norm != "none":
        remarks.append(add_patch_norm(model, settings.patch_norm, name))
    if settings.weights is not None:
        remarks.append(load_weights(model, Path(settings.weights), name))
    return remarks


def _attempt(action: Callable[[], Any], failed: str) -> Any:
    try:
        return action()
    except ModelError:
        raise
    except Exception as error:  # model code of two zoos: it may raise anything
        raise ModelError(f"{failed}: {first_line(error)}") from error


def _probe(model: nn.Module, size: int, name: str, source: Source) -> None:
    """Run two blank images through the model and check the shape of what comes out."""
    blank = torch.zeros(2, source.channels, size, size)
    model.eval()
    with torch.no_grad():
        shape = f"{source.channels} × {size} × {size}"
        output = _attempt(lambda: model(blank), f"{name} does not run on {shape} images")
    expected = (2, len(source.classes))
    if tuple(logits_of(output).shape) != expected:
        raise ModelError(
            f"{name} gives {tuple(logits_of(output).shape)} for two images, not {expected}; "
            "it is no image classifier, or its number of classes is fixed: choose another model"
        )


def _own_size(model: nn.Module, name: str) -> int:
    """Return the image size that the model was published for, in pixels."""
    published = getattr(model, "pretrained_cfg", None)
    if isinstance(published, dict) and "input_size" in published:
        return int(published["input_size"][-1])
    size = getattr(getattr(model, "config", None), "image_size", None)
    if isinstance(size, (list, tuple)):
        size = size[0]
    if not size:
        raise ModelError(f"{name} does not say its image size; pass --image-size")
    return int(size)


def _builder(settings: CompareSettings, source: Source) -> Builder:
    path = Path(settings.model).expanduser()
    if path.is_dir():
        if settings.model_args:
            raise ModelError("--model-arg is for timm models; edit the folder's config.json")
        return huggingface_builder(path, source.channels, source.classes)
    if path.is_absolute() or settings.model.startswith((".", "~")) or "/" in settings.model:
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(
            f"no model folder {settings.model}; pass a timm name, or a local folder with a "
            f"config.json{'; ' + did_you_mean(path.name, near) if near else ''}"
        )
    return _timm_builder(settings, source)


def _timm_builder(settings: CompareSettings, source: Source) -> Builder:
    import timm

    name = settings.model
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}; {did_you_mean(name, timm.list_models())}")
    fixed = {"num_classes": len(source.classes), "in_chans": source.channels}
    _check_no_clash(dict(settings.model_args), fixed)
    arguments = fixed | dict(settings.model_args)

    def build(size: int | None) -> nn.Module:
        if size is None:
            return _create(name, arguments)
        try:
            return _create(name, arguments | {"img_size": size})
        except TypeError as error:
            # Most convolutional models take any size, and so have no such argument.
            if "img_size" not in str(error):
                raise
            return _create(name, arguments)

    return build


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return model


def _check_no_clash(given: dict[str, Any], fixed: dict[str, int]) -> None:
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ModelError(
                f"--model-arg {name}={given[name]}, but the data have {value}: leave it out"
            )
