"""A copy of a model without its weights, to run on the meta device."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tract_hub.adapters.tracing.closures import rebind_closures
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

_MACHINERY = ("_hf_hook", "__composable_api_state_key")  # beginnings of names
"""Where accelerate and FSDP2 keep what moves the weights, and perhaps the weights."""

_LIBRARIES = ("torch.", "tract_hub.", "transformers.", "timm.", "accelerate.", "deepspeed.")
"""Whose hooks make weights, move them or collect features, and leave the pixels as they are."""


def meta_skeleton(model: nn.Module) -> nn.Module:
    """Copy a model's structure; parameters and large buffers become meta tensors.

    The copy is in eval mode, where a forward needs no labels, and without the user's hooks, so that
    running it calls nobody's code; hooks that the forward cannot do without stay.

    Raises:
        ExampleInputError: the model holds something that cannot be copied.

    """
    memo: dict[int, Any] = {}
    _refuse_shapeless(model)
    for parameter in model.parameters():
        memo[id(parameter)] = _on_meta(parameter)
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name.startswith(_MACHINERY):
                memo[id(value)] = None
    for hooks in _hook_tables(model):
        memo[id(hooks)] = OrderedDict((k, hook) for k, hook in hooks.items() if _computes(hook))
    try:
        with _WithoutWeights():
            skeleton = _copied(model, memo)
    except Exception as error:
        raise ExampleInputError(
            f"{type(model).__name__} cannot be copied to follow its pixels ({error}): "
            "name its first layers with stems=[…]"
        ) from error
    rebind_closures(skeleton, memo)
    for module in skeleton.modules():
        module.training = False
        if "_old_forward" in module.__dict__:  # accelerate's, which moves weights to a device
            module.__dict__["forward"] = module._old_forward
    return skeleton


@contextmanager
def training(skeleton: nn.Module) -> Iterator[None]:
    """Put a skeleton in training mode, and let it draw numbers that nobody else misses."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        for module in skeleton.modules():
            module.training = True
        try:
            yield
        finally:
            for module in skeleton.modules():
                module.training = False
            random.setstate(python)
            if numpy:
                numpy.random.set_state(drawn)


def _refuse_shapeless(model: nn.Module) -> None:
    name = type(model).__name__
    parameters = list(model.parameters())
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in parameters):
        raise ExampleInputError(
            f"{name} has lazy parameters without a shape: run one forward, then enable TrAct"
        )
    flat = any(getattr(parameter, "_is_flat_param", False) for parameter in parameters)
    if flat or _has_fsdp_inside(model):
        raise ExampleInputError(
            f"{name}: FSDP has flattened its parameters: enable TrAct before wrapping it, with "
            "use_orig_params=True, or use fully_shard"
        )


def _has_fsdp_inside(model: nn.Module) -> bool:
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    """The same shape without values; a sharded parameter has its whole shape."""
    empty = torch.empty_strided(
        parameter.size(), parameter.stride(), dtype=parameter.dtype, device="meta"
    )
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Deep-copy a module, also one that FSDP2 forbids to copy."""
    sharded = [m for m in model.modules() if type(m).__mro__[1].__name__ == "FSDPModule"]
    for module in sharded:
        ordinary: type[nn.Module] = type(module).__bases__[1]
        memo[id(module)] = ordinary.__new__(ordinary)
    for module in sharded:
        memo[id(module)].__dict__.update(copy.deepcopy(module.__getstate__(), memo))
    return copy.deepcopy(model, memo)


class _WithoutWeights(TorchFunctionMode):
    """Empties every tensor that is deep-copied: buffers, and what forwards keep in attributes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__deepcopy__:
            return _without_weight(args[0])
        return func(*args, **(kwargs or {}))


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
    return _origin(hook).startswith(("torch.nn.utils", "transformers.utils.output_capturing"))


def has_pre_hook_of_a_user(module: nn.Module) -> bool:
    """Whether a hook that the skeleton leaves out may change what the module is called on."""
    return not all(
        _origin(hook).startswith(_LIBRARIES) for hook in module._forward_pre_hooks.values()
    )


def _origin(hook: Any) -> str:
    """The module that a hook was written in."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__module__", None) or ""
