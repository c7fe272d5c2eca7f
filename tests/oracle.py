"""The closed form in float64, by another route than the package's.

The rows of a convolution's input are read off by torch's own convolution with one-hot kernels:
the output channel of the kernel that is 1 at feature i is feature i of every row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_rows(x: Tensor, weight: Tensor, *, groups: int = 1, **geometry) -> list[Tensor]:
    """X of each group, (rows, n), for an input already padded by anything but zeros."""
    features = weight[0].numel()
    kernels = torch.eye(features, dtype=x.dtype).view(features, *weight.shape[1:])
    convolve = CONVOLUTIONS[weight.dim() - 2]
    x = x if x.dim() == weight.dim() else x.unsqueeze(0)
    return [
        convolve(part, kernels, **geometry).movedim(1, -1).reshape(-1, features)
        for part in x.chunk(groups, dim=1)
    ]


def layer_rows(layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """X of each group of an ordinary Conv or Linear layer, in float64."""
    x = x.detach().double()
    if isinstance(layer, torch.nn.Linear):
        return [x.reshape(-1, x.shape[-1])]
    geometry = {"stride": layer.stride, "dilation": layer.dilation, "padding": layer.padding}
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        geometry["padding"] = 0
    return conv_rows(x, layer.weight.double(), groups=layer.groups, **geometry)


def closed_form(gradient: Tensor, rows: list[Tensor], lam: float) -> Tensor:
    """∇W · (XᵀX / rows + λI)⁻¹ for each group, by an explicit inverse in float64."""
    parts = []
    for part, X in zip(gradient.double().chunk(len(rows)), rows, strict=True):
        moment = X.T @ X / max(len(X), 1) + lam * torch.eye(X.shape[1], dtype=torch.double)
        parts.append((part.flatten(1) @ torch.linalg.inv(moment)).view_as(part))
    return torch.cat(parts)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected (or 1 where that is 0)."""
    scale = expected.double().norm()
    return float((got.double() - expected.double()).norm() / (scale if scale > 0 else 1.0))


_LINEAR = {F.linear, torch.ops.aten.linear.default}
_LAYERS = {torch.conv1d, torch.conv2d, torch.conv3d, torch.ops.aten.conv2d.default, *_LINEAR}


class _FirstLayers(TorchFunctionMode):
    """Puts the closed form into the gradient of each weight that meets an input without one."""

    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def __init__(self, lam: float) -> None:
        super().__init__()
        self.lam = lam

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = {**dict(zip(self.names, args, strict=False)), **(kwargs or {})}
        if func not in _LAYERS or given["input"].requires_grad or not given["weight"].requires_grad:
            return func(*args, **(kwargs or {}))
        given["weight"] = used = given["weight"].clone()
        x, y = given["input"].detach().double(), used.detach().double()
        geometry = {name: value for name, value in given.items() if name in self.names[3:]}
        rows = [x.flatten(0, -2)] if func in _LINEAR else conv_rows(x, y, **geometry)
        used.register_hook(lambda raw: closed_form(raw, rows, self.lam).to(raw.dtype))
        return func(**given)


def corrected_gradients(
    model: nn.Module, loss: Callable[[], Tensor], lam: float = 0.1
) -> dict[str, Tensor]:
    """What each gradient of a model without TrAct would be with it."""
    model.zero_grad()
    with _FirstLayers(lam):
        value = loss()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
