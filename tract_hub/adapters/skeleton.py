"""A copy of a model without its weights, to run on the meta device."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tract_hub.errors import ExampleInputError

SMALL = 65_536
"""Elements up to which a buffer keeps its values: forwards read tables and flags, not weights."""

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def meta_skeleton(model: nn.Module) -> nn.Module:
    """Copy a model's structure; parameters and large buffers become meta tensors.

    The copy is in eval mode and without the user's hooks, so that running it neither updates
    statistics nor calls anybody's code; hooks that the forward cannot do without stay.

    Raises:
        ExampleInputError: the model holds something that cannot be copied.

    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ExampleInputError(
                f"{type(model).__name__} has lazy parameters without a shape: run one forward first"
            )
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for tensor in _other_tensors(model):
        memo[id(tensor)] = _without_weight(tensor)
    for hooks in _hook_tables(model):
        memo[id(hooks)] = OrderedDict((k, hook) for k, hook in hooks.items() if _computes(hook))
    try:
        skeleton = copy.deepcopy(model, memo)
    except Exception as error:
        raise ExampleInputError(
            f"{type(model).__name__} cannot be copied to follow its pixels ({error}): "
            "name its first layers with stems=[…]"
        ) from error
    for module in skeleton.modules():
        module.training = False
    return skeleton


def _other_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.buffers()
    for module in model.modules():
        for value in module.__dict__.values():
            candidates = value if isinstance(value, (list, tuple)) else (value,)
            yield from (item for item in candidates if isinstance(item, Tensor))


def _without_weight(tensor: Tensor) -> Tensor:
    if tensor.numel() <= SMALL and not tensor.is_meta:
        return tensor.detach().to("cpu", copy=True)
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _hook_tables(model: nn.Module) -> Iterator[dict[int, Any]]:
    for module in model.modules():
        for name in _HOOKS:
            yield module.__dict__.get(name, {})


def _computes(hook: Any) -> bool:
    """Whether the forward needs a hook: torch's make weights, Transformers' collect features."""
    module = getattr(hook, "__module__", None) or ""
    return module.startswith(("torch.nn.utils", "transformers.utils.output_capturing"))
