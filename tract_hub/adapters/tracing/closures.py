"""Functions put on a module, such as a patched ``forward``, whose closure holds the module.

``copy.deepcopy`` keeps functions as they are, so that a copied module would run the original.
"""

from __future__ import annotations

import copy
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def rebind_closures(skeleton: nn.Module, memo: dict[int, Any]) -> None:
    """Let the functions on a copied model's modules refer to the copy.

    Args:
        skeleton: the copy.
        memo: as ``copy.deepcopy`` filled it when it made the copy.

    """
    for module in skeleton.modules():
        for name, value in module.__dict__.items():
            if isinstance(value, FunctionType) and value.__closure__:
                module.__dict__[name] = _rebound(value, memo)


def _rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    if not function.__closure__:
        return function
    if id(function) in memo and memo[id(function)] is not function:
        known: FunctionType = memo[id(function)]
        return known
    cells = tuple(CellType() for _ in function.__closure__)
    new = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    new.__kwdefaults__ = function.__kwdefaults__
    memo[id(function)] = new  # before its cells: a function may refer to itself
    for cell, original in zip(cells, function.__closure__, strict=True):
        try:
            cell.cell_contents = _copied(original.cell_contents, memo)
        except ValueError:  # an empty cell
            continue
    return new


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, FunctionType):
        return _rebound(value, memo)
    if isinstance(value, (nn.Module, MethodType)):
        owner = getattr(value, "__self__", value)
        return copy.deepcopy(value, memo) if id(owner) in memo else value
    return value
