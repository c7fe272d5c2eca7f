"""What autograd's engine does now: which backward runs, and what it will reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Gate(torch.autograd.Function):
    """What a weight passes through: nothing changes but its gradient."""


def dual_identity(ctx: Any, *tangents: Any) -> Any:
    """Return what a gate's forward-mode derivative is: that of the identity, as every value is.

    No gate of a compiled graph can have it: torch.compile refuses functions that do.
    """
    return tangents[0].view_as(tangents[0])


def running_backward() -> int:
    """Return the number of the backward that runs in this thread; no other ever has the same."""
    return torch._C._current_graph_task_id()


def in_transform() -> bool:
    """Whether a transform of torch.func runs; it wraps what comes of plain tensors, too."""
    # Not `is not None`: in a graph that is compiled, the class alone is known of what this returns.
    functorch = torch._C._functorch
    return isinstance(functorch.peek_interpreter_stack(), functorch.CInterpreter)


def keeps_graph() -> bool:
    """Whether the backward that runs in this thread may run through its graph again."""
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


def will_run(node: Any) -> bool:
    """Tell whether the backward that runs now executes a node, or has executed it."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf, of which autograd.grad returns the gradient instead
        return False


def accumulates() -> bool:
    """Tell whether this backward adds to the ``.grad`` of any leaf below the running node.

    ``torch.autograd.grad`` does not: no wrapper takes note of it, and it is no part of a step.
    """
    return any(map(will_run, _leaf_nodes(torch._C._current_autograd_node())))


def leaves(node: Any) -> list[Tensor]:
    """Return the leaf tensors that a node's gradient goes to."""
    return [leaf.variable for leaf in _leaf_nodes(node)]


def is_made_of(tensor: Tensor, leaf: Tensor) -> bool:
    """Tell whether a tensor was computed from a leaf, by its graph, and not through a gate."""
    node = tensor.grad_fn
    return node is not None and any(
        known.variable is leaf for known in _leaf_nodes(node, through_gates=False)
    )


def _leaf_nodes(node: Any, through_gates: bool = True) -> Iterator[Any]:
    seen, rest = {node}, [node]
    while rest:
        node = rest.pop()
        if hasattr(node, "variable"):
            yield node
        if not through_gates and issubclass(getattr(node, "_forward_cls", object), Gate):
            continue
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                rest.append(below)
