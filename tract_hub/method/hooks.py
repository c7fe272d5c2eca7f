"""Putting hooks on a module such that forwards, compilers and other threads see them rightly."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def let_the_compiler_see_hooks() -> None:
    """Have graphs that torch.compile makes from now on checked for the hooks of their modules.

    It takes hooks for something that all models of a class have, or none: of two of them, one with
    TrAct and one without, the second would run the first one's graph, and nothing would say so.
    """
    import torch._dynamo  # takes a second where nothing else has imported it

    torch._dynamo.config.skip_nnmodule_hook_guards = False


def prepend_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Register a hook that runs before every other.

    What stands first in the table is put there first, too: the compiler of torch 2.11 looks hooks
    up in the order in which they came, and finds another where only the table was reordered.
    """
    module.register_forward_pre_hook(hook)
    table = module._forward_pre_hooks
    for key in list(table)[:-1]:
        table[key] = table.pop(key)


def remove_hook(table: dict[int, Any], owner: object) -> list[int]:
    """Remove an object's methods from a table of hooks; return their keys there."""
    keys = [key for key, hook in list(table.items()) if getattr(hook, "__self__", None) is owner]
    for key in keys:
        table.pop(key, None)
    return keys


def runs_already(module: nn.Module) -> bool:
    """Tell a forward that is called within another of the same module, from a pre-hook of its own.

    One that Ctrl-C ended is no longer on Python's stack, though no hook has seen its end.
    """
    calls, frame = 0, inspect.currentframe()
    while frame is not None and calls < 2:
        here = frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
        calls, frame = calls + here, frame.f_back
    return calls == 2


def leave_graph() -> None:
    """End a compiled graph here: what comes is done by Python."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            "TrAct sums the rows of a step outside of compiled graphs: compile without fullgraph, "
            "compile other parts of the model, or pass scope='rank'"
        )


def is_tracing() -> bool:
    """Whether a graph is being recorded for inference: it must be the ordinary model's."""
    return (
        torch._C._get_tracing_state() is not None
        or torch.compiler._is_exporting_flag  # torch 2.11 compiles is_exporting() to True
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
    )
