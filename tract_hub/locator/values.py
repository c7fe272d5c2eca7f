"""Answers for the few operations that ask a tensor for its values, where it has none.

A forward on the meta device has shapes and no numbers. Where a model's control flow depends on
numbers, one of its branches is taken; where it selects elements, it is given all of them. Small
tensors that a forward makes or moves keep their numbers, whatever device it names: grids, sizes
and offsets are often read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tract_hub.errors import ExampleInputError
from tract_hub.locator.meta_copy import SMALL

aten = torch.ops.aten

_META, _CPU = torch.device("meta"), torch.device("cpu")


class MetaAnswers(TorchDispatchMode):
    """Runs operations on the meta device as soon as one of their tensors is there.

    Nothing is drawn from the generators of the process. A forward that touches one of the user's
    ``live`` tensors is ended.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Without it, the first operation imports the compiler, which takes a second. There is no
        # public way to say that this mode is only used eagerly.
        return False

    def __init__(self, live: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = {id(tensor): tensor for tensor in live}  # held: an id is used again
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        if any(id(tensor) in self._live for tensor in given):
            raise ExampleInputError("its forward holds on to the original of a copied module")
        if not any(tensor.is_meta for tensor in given):
            return self._without_meta(func, args, kwargs)
        if not all(tensor.is_meta for tensor in given):
            real, (args, kwargs) = args, tree_map_only(Tensor, _to_meta, (args, kwargs))
            # ``_schema``, here and below: an operator tells its arguments by no public name.
            if func._schema.is_mutable and not real[0].is_meta:  # its copy is written, not it
                _answered(func, args, kwargs)
                return real[0]
        return _answered(func, args, kwargs)

    def _without_meta(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what takes or makes numbers; they stay on the CPU where they are few."""
        on_meta = {**kwargs, "device": _META}
        if torch.Tag.nondeterministic_seeded in func.tags:
            # rand, randn, randint and randperm: peft's LoHa asks ``rand(1) > dropout``.
            own = f"{func._schema.overload_name}_generator".lstrip("_")
            seeded = getattr(func.overloadpacket, own, None)
            if seeded is not None:
                drawn = func(*args, **on_meta)
                if drawn.numel() > SMALL:
                    return drawn
                return seeded(*args, **{**kwargs, "device": _CPU, "generator": self._generator})
            if any(argument.name == "generator" for argument in func._schema.arguments):
                kwargs = {**kwargs, "generator": self._generator}
            elif next(tensors_in(args), None) is not None:
                return func(*tree_map_only(Tensor, _to_meta, args), **kwargs)
            else:
                return func(*args, **on_meta)
        if func.name().partition(".")[0] in _MAKERS:
            made = func(*args, **on_meta)
            return made if made.numel() > SMALL else func(*args, **{**kwargs, "device": _CPU})
        elsewhere = torch.device(kwargs.get("device") or "cpu").type != "cpu"
        return func(*args, **(on_meta if elsewhere else kwargs))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in the arguments of an operation, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


def _answered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func.name() in _ALIKE and _are_alike(args):
        return torch.empty_like(args[0])
    return _ANSWERS.get(func.name(), func)(*args, **kwargs)


def _are_alike(args: tuple[Any, ...]) -> bool:
    shape, dtype = args[0].shape, args[0].dtype
    others = (other for other in args[1:] if isinstance(other, Tensor))
    return dtype.is_floating_point and all(o.shape == shape and o.dtype == dtype for o in others)


def _scalar(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


def list_of(tensor: Tensor) -> Any:
    """Answer ``tolist`` for a tensor without values."""
    return torch.full(tensor.shape, _scalar(tensor), dtype=tensor.dtype, device="cpu").tolist()


def _places(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _masked_select(tensor: Tensor, mask: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    return tensor.expand(shape).reshape(-1)


def _index(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Index with every mask taken to be all true."""
    whole: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            whole.append(index)
        else:
            whole += [_places(index.numel()) for _ in index.shape]
    return aten.index.Tensor(tensor, whole)  # type: ignore[no-any-return]


def _one_value(tensor: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Answer ``unique`` as if all elements were equal: values, places and counts."""
    return tensor.new_empty(1), _places(*tensor.shape), _places(1)


def _to_copy(tensor: Tensor, **kwargs: Any) -> Any:
    """Keep a tensor without values on the meta device."""
    return aten._to_copy.default(tensor, **{**kwargs, "device": _META})


def _batch_norm(tensor: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = tensor.new_empty(tensor.shape[1])
    return torch.empty_like(tensor), statistics, statistics


def _layer_norm(tensor: Tensor, shape: list[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = tensor.new_empty([*tensor.shape[: -len(shape)], *[1] * len(shape)])
    return tensor.new_empty(tensor.shape), statistics, statistics  # contiguous, as torch's


# torch computes shapes of these in Python, which takes half of the time of a ViT-B/16 and, by its
# batch norms, of a ResNet-50 (torch 2.14, cProfile of locate):
_ALIKE = frozenset(
    "aten::add.Tensor aten::sub.Tensor aten::mul.Tensor aten::div.Tensor aten::gelu aten::relu "
    "aten::silu".split()
)

_ANSWERS: dict[str, Callable[..., Any]] = {
    # A mixture of experts: on meta, torch takes half precision alone (dots3_note).
    "aten::_grouped_mm": lambda a, b, *_, **__: a.new_empty((*a.shape[:-1], b.shape[-1])),
    # docTR's CRNN computes its loss in its forward.
    "aten::_ctc_loss.Tensor": lambda scores, *_, **__: (scores[0, :, 0], scores.new_empty(0)),
    "aten::_local_scalar_dense": _scalar,
    "aten::_to_copy": _to_copy,
    "aten::_unique2": _one_value,
    "aten::index.Tensor": _index,
    "aten::masked_select": _masked_select,
    "aten::native_batch_norm": _batch_norm,
    "aten::native_layer_norm": _layer_norm,
    "aten::nonzero": lambda tensor: _places(tensor.numel(), tensor.dim()),
    # One detection is kept: forwards handle them one by one, so one shows as much as a thousand.
    "torchvision::nms": lambda boxes, scores, threshold: _places(min(1, scores.numel())),
}

_MAKERS = frozenset(
    "aten::_to_copy aten::arange aten::full aten::full_like aten::linspace aten::ones "
    "aten::ones_like aten::scalar_tensor aten::zeros aten::zeros_like".split()
)
"""Operations that make or move tensors of numbers: small ones stay on the CPU to be read back."""
