"""torchvision: images, lists of images, pairs of frames, clips, by the task's subpackage."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from tract_hub.locator.zoos.examples import (
    Example,
    declared_size,
    image,
    image_example,
    images_example,
)


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield example inputs for a torchvision model, or one derived from its classes."""
    for task, make in _BY_TASK.items():
        if any(task in cls.__module__ for cls in type(model).__mro__):
            yield make(model)
            return
    yield image_example(model, 2, 3, *(declared_size(model) or (224, 224)))
    yield image_example(model, 2, 3, 299, 299)
    yield _clip(model)


def _detection(model: nn.Module) -> Example:
    images = [image(model, 3, 320, 320), image(model, 3, 320, 320)]
    return Example(args=(images,), pixels=tuple(images), channel_axis=0)


def _clip(model: nn.Module) -> Example:
    frames = getattr(model, "temporal_size", None) or 16
    return image_example(model, 2, 3, frames, *(declared_size(model) or (224, 224)))


_BY_TASK: dict[str, Callable[[nn.Module], Example]] = {
    "torchvision.models.detection": _detection,
    "torchvision.models.optical_flow": lambda model: images_example(model, 2, 2, 3, 128, 128),
    "torchvision.models.video": _clip,
}
