"""What single training images give to the gradient of the first layer's weight.

That gradient is a sum over images: each image's input times the gradient of its outputs, with
TrAct divided by the damped Gram matrix of the whole batch. Here, each term is taken alone: the
model's backward brings the gradient to the layer's outputs, and the layer's own backward takes it
on to the weight with all other images' outputs at zero. The graph is the one that training has,
so derived weights, padding and TrAct itself are those of the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tract_hub.errors import ModelError
from tract_hub.stem import Stem
from tract_hub.studies.compare.records import Arm
from tract_hub.studies.compare.study import Study
from tract_hub.studies.compare.training import fresh_model
from tract_hub.studies.images.prepared import train_loader
from tract_hub.studies.models.plan import logits_of

MOST_IMAGES = 256
# A term costs a backward of the layer over its whole batch.
MOST_IN_BATCH = 128


def measure_contributions(study: Study) -> dict[str, Any]:
    """Measure in every arm, at the start weights of the first seed, in float32.

    The images are those of the first seed's first batches, without augmentation; a batch is as
    large as one process has it in training, or ``MOST_IN_BATCH``.

    Args:
        study: what all runs share.

    Returns:
        ``arms``, ``seed``, ``stem``, ``batch`` (images in one); by image ``brightness`` (mean of
        its pixels in [0, 1]) and ``contrast`` (their deviation); by arm ``norms``, of each image's
        term; ``residual``, how far the terms' sum is from the gradient, relative, at most. None
        where there is no finite number.

    Raises:
        ModelError: the layer's outputs cannot be told apart by images.

    """
    batches, stem, arms = _batches(study), study.stems[0], study.arms
    pixels = torch.cat([images for images, _ in batches]).flatten(1).double() / 255
    measured = {str(arm): _measured(study, arm, batches) for arm in arms}
    return {
        "arms": [str(arm) for arm in arms],
        "seed": study.settings.seeds[0],
        "stem": stem.weight_name,
        "batch": len(batches[0][1]),
        "brightness": _rounded(pixels.mean(1)),
        "contrast": _rounded(pixels.std(1, correction=0)),
        "norms": {arm: _rounded(norms) for arm, (norms, _) in measured.items()},
        "residual": _number(max(residual for _, residual in measured.values())),
    }


def _batches(study: Study) -> list[tuple[Tensor, Tensor]]:
    settings = study.settings
    share = settings.batch_size // study.accelerator.num_processes
    size = min(MOST_IN_BATCH, max(1, share))
    loader = train_loader(study.data, "none", size, settings.seeds[0], settings.workers)
    return list(itertools.islice(loader, MOST_IMAGES // size))


def _measured(
    study: Study, arm: Arm, batches: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, float]:
    """Return the norm of each image's term, and the largest relative error of their sum."""
    device = study.accelerator.device
    model = fresh_model(study, arm, study.settings.seeds[0]).to(device).train()
    norms, residuals = [], []
    for images, labels in batches:
        inputs, targets = study.normalised(images.to(device)), labels.to(device)
        smoothing = study.settings.label_smoothing
        whole, terms = image_terms(model, study.stems[0], inputs, targets, smoothing)
        left = whole.clone()
        for term in terms:
            norms.append(term.norm().cpu())
            left -= term
        residuals.append((left.norm() / whole.norm().clamp_min(1e-30)).item())
    return torch.stack(norms), max(residuals)


def image_terms(
    model: nn.Module, stem: Stem, images: Tensor, labels: Tensor, smoothing: float = 0.0
) -> tuple[Tensor, Iterator[Tensor]]:
    """Take the gradient of a first layer's weight apart, image by image.

    Args:
        model: in training mode, with TrAct or without.
        stem: one of its first layers.
        images: normalised, batch × channels × height × width.
        labels: int64, batch.
        smoothing: of the labels.

    Returns:
        The gradient of the batch's mean loss, shaped as the weight, and an iterator over the
        terms that it is the sum of, one an image. Both in float64 where the device has it.

    Raises:
        ModelError: the layer's outputs cannot be told apart by images.

    """
    weight = model.get_parameter(stem.weight_name)
    images = images.detach().requires_grad_()
    outputs, logits = _with_outputs(model, stem, images)
    if _mixed(images, outputs):
        raise ModelError(f"what {stem.module_name} gives cannot be told apart by images")
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    whole, *arriving = torch.autograd.grad(
        loss, [weight, *outputs], retain_graph=True, materialize_grads=True
    )
    return _wide(whole), _terms(weight, outputs, arriving, len(labels))


def _terms(
    weight: Tensor, outputs: Sequence[Tensor], arriving: Sequence[Tensor], images: int
) -> Iterator[Tensor]:
    alone = [torch.zeros_like(gradient) for gradient in arriving]
    for i in range(images):
        for part, gradient in zip(alone, arriving, strict=True):
            rows = _rows_of(i, images, gradient)
            part[rows] = gradient[rows]
        (term,) = torch.autograd.grad(outputs, weight, alone, retain_graph=True)
        for part in alone:
            part[_rows_of(i, images, part)] = 0
        yield _wide(term)


def _with_outputs(model: nn.Module, stem: Stem, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run a forward; return what the modules that apply the weight gave, and the class scores."""
    found: list[Any] = []
    hooks = [
        model.get_submodule(site.module_name).register_forward_hook(
            lambda module, inputs, output: found.append(output)
        )
        for site in stem.sites
    ]
    try:
        logits = logits_of(model(images.clone()))  # which a model may change in place
    finally:
        for hook in hooks:
            hook.remove()
    return found, logits


def _mixed(images: Tensor, outputs: Sequence[Any]) -> bool:
    """Tell whether the part of the outputs that would be the last image's knows other images."""
    count = len(images)
    if any(not isinstance(output, Tensor) or len(output) % count for output in outputs):
        return True
    last = [torch.zeros_like(output) for output in outputs]
    for part in last:
        part[_rows_of(count - 1, count, part)] = 1
    (reached,) = torch.autograd.grad(
        outputs, images, last, retain_graph=True, materialize_grads=True
    )
    return bool(reached[:-1].any())


def _rows_of(image: int, images: int, tensor: Tensor) -> slice:
    """Return one image's part of a tensor whose first dimension goes through the images in turn."""
    rows = len(tensor) // images
    return slice(image * rows, (image + 1) * rows)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "mps" else tensor.double()


def _rounded(values: Tensor) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
