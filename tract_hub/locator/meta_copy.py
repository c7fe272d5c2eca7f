"""A copy of a model without its weights, to run on the meta device."""

from __future__ import annotations

import copy
import io
import itertools
from collections import OrderedDict
from functools import partial
from types import CellType, FunctionType, GeneratorType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tract_hub.errors import ExampleInputError

SMALL = 65_536
"""Elements up to which a buffer keeps its values: forwards read tables and flags, not weights."""

_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))

_LEFT_OUT = ("_hf_hook", "__composable_api_state_key", "_compiled_call_impl")  # beginnings of names
"""Where accelerate and FSDP2 keep what moves the weights, and torch what it compiled."""

_ATOMS = (type(None), bool, int, float, str, bytes, type, torch.dtype, torch.device)

_LIBRARIES = ("torch.", "tract_hub.", "transformers.", "timm.", "accelerate.", "deepspeed.")
"""Whose hooks make weights, move them or collect features, and leave the pixels as they are."""


def meta_copy(model: nn.Module, user_hooks: bool = False) -> nn.Module:
    """Copy a model's structure; parameters and large buffers become meta tensors.

    Every parameter of the copy takes a gradient, so that autograd remembers where it went. What
    cannot be copied (a lock, a process group) is shared: only modules and tensors matter here.
    Without the ``user_hooks``, running the copy calls nobody's code; fastai's DynamicUnet cannot
    run without.
    """
    name, parameters = type(model).__name__, list(model.parameters())
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in parameters):
        raise ExampleInputError(
            f"{name} has lazy parameters without a shape: run one forward, then enable TrAct"
        )
    # FSDP1 has no public mark of a flattened parameter, nor of a module inside that it manages.
    flat = any(getattr(parameter, "_is_flat_param", False) for parameter in parameters)
    inside = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    if flat or inside:
        raise ExampleInputError(
            f"{name}: FSDP has flattened its parameters: enable TrAct before wrapping it, with "
            "use_orig_params=True, or use fully_shard"
        )
    return _Copier(model, user_hooks).copied


class _Copier:
    """Copies every module of a model attribute by attribute.

    ``copy.deepcopy`` of the whole would fail on the first attribute that it cannot copy.
    """

    def __init__(self, model: nn.Module, user_hooks: bool) -> None:
        self.user_hooks = user_hooks
        self.memo: dict[int, Any] = {id(p): _on_meta(p) for p in model.parameters()}
        # The state of a scripted module is not in its attributes.
        own = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self.memo.update((id(module), object.__new__(_ordinary_class(module))) for module in own)
        with _WithoutWeights():
            for module in own:
                self._fill(module, self.memo[id(module)].__dict__)
            self.copied: nn.Module = self._value(model)

    def _fill(self, module: nn.Module, attributes: dict[str, Any]) -> None:
        for name, value in module.__dict__.items():
            if name in _HOOKS:
                kept = value.items() if name.startswith("_forward") else ()
                hooks = ((key, self._value(hook)) for key, hook in kept if self._needs(hook))
                attributes[name] = OrderedDict(hooks)
            elif getattr(value, "tract_hub_forward", False) and value.module is not module:
                pass  # of the module that this one is a shallow copy of
            elif not name.startswith(_LEFT_OUT):
                attributes[name] = self._value(value)
        if "_old_forward" in attributes:  # accelerate's, which moves weights to a device
            attributes["forward"] = attributes["_old_forward"]

    def _value(self, value: Any) -> Any:
        if isinstance(value, _ATOMS):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if getattr(value, "tract_hub_forward", False):
            return self._value(getattr(value, "__wrapped__", None))  # what it stands for
        if isinstance(value, nn.Parameter):
            return self.memo.setdefault(id(value), _on_meta(value))
        scripted = isinstance(value, torch.jit.ScriptModule)
        if isinstance(value, nn.Module) and not scripted:  # in a list, or hidden
            new = self.memo[id(value)] = object.__new__(_ordinary_class(value))
            self._fill(value, new.__dict__)
            return new
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, partial):
            keywords = {name: self._value(each) for name, each in value.keywords.items()}
            return partial(self._value(value.func), *map(self._value, value.args), **keywords)
        if type(value) in (dict, OrderedDict):
            items: dict[Any, Any] = type(value)()
            self.memo[id(value)] = items
            items.update((key, self._value(item)) for key, item in value.items())
            return items
        if type(value) in (list, tuple, set):
            return type(value)(self._value(item) for item in value)
        return self._object(value)

    def _object(self, value: Any) -> Any:
        if isinstance(value, GeneratorType):  # such as a schedule: to share it would move it on
            return itertools.repeat(1.0)
        if isinstance(value, io.IOBase):
            return io.StringIO() if isinstance(value, io.TextIOBase) else io.BytesIO()
        known = len(self.memo)
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:  # whatever a class's own copying raises
            while len(self.memo) > known:  # forget its parts, which were copied by half
                self.memo.popitem()
            return value

    def _function(self, function: FunctionType) -> FunctionType:
        """Copy a function of a module, so that its closure holds the copies of modules."""
        if not function.__closure__:
            return function
        cells = tuple(CellType() for _ in function.__closure__)
        new = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
        )
        new.__kwdefaults__ = function.__kwdefaults__
        self.memo[id(function)] = new  # before its cells: a function may refer to itself
        for cell, original in zip(cells, function.__closure__, strict=True):
            try:
                content = original.cell_contents
            except ValueError:  # an empty cell
                continue
            ours = isinstance(content, (FunctionType, MethodType, partial, nn.Module))
            ours = ours or getattr(content, "tract_hub_forward", False)
            cell.cell_contents = self._value(content) if ours else content
        return new

    def _needs(self, hook: Any) -> bool:
        """Torch's hooks make weights, Transformers' collect features that the forward reads."""
        makers = ("torch.nn.utils", "transformers.utils.output_capturing")
        return (self.user_hooks and _is_of_user(hook)) or _origin(hook).startswith(makers)


def _ordinary_class(module: nn.Module) -> type[nn.Module]:
    """The class without FSDP2, which forbids to copy, and without the compiler."""
    cls = type(module)
    if cls.__name__ == "OptimizedModule":
        return _NotCompiled
    return cls.__bases__[1] if cls.__mro__[1].__name__ == "FSDPModule" else cls


class _NotCompiled(nn.Module):
    """Stands for a module of ``torch.compile``."""

    _orig_mod: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    """The same shape without values; a sharded parameter has its whole shape."""
    empty = torch.empty_strided(
        parameter.size(), parameter.stride(), dtype=parameter.dtype, device="meta"
    )
    return nn.Parameter(empty, requires_grad=empty.is_floating_point() or empty.is_complex())


class _WithoutWeights(TorchFunctionMode):
    """Empties every tensor that is deep-copied: buffers, and what forwards keep in attributes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        if args[0].numel() <= SMALL and not args[0].is_meta:
            return args[0].detach().to("cpu", copy=True)
        return torch.empty_like(args[0], device="meta", requires_grad=False)


def has_user_hooks(model: nn.Module) -> bool:
    """Whether a copy leaves out forward hooks of the user."""
    # torch has no public list of a module's hooks, here and below.
    tables = (table for m in model.modules() for table in (m._forward_hooks, m._forward_pre_hooks))
    return any(_is_of_user(hook) for table in tables for hook in table.values())


def has_user_pre_hook(module: nn.Module) -> bool:
    """Whether a hook that the copy leaves out may change what the module is called on."""
    return any(map(_is_of_user, module._forward_pre_hooks.values()))


def _is_of_user(hook: Any) -> bool:
    return not _origin(hook).startswith(_LIBRARIES)


def _origin(hook: Any) -> str:
    """The module that a hook was written in."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__module__", None) or ""
