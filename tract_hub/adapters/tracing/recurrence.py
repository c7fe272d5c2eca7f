"""Recurrent layers without their recurrence: every step has the shapes of the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def run_first_step(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Run a recurrent layer on one step and repeat its output; None for any other function.

    A step takes about a millisecond even where nothing is computed: a model that scans rows and
    columns of an image has thousands of them.
    """
    if func not in _RECURRENT or len(args) != 9:  # eight where the sequences are packed
        return None
    time = 1 if args[-1] else 0
    steps: int = args[0].shape[time]
    if steps < 1:
        return None
    states = tree_map_only(Tensor, lambda state: torch.empty_like(state, device="meta"), args[1])
    output, *states = func(args[0].narrow(time, 0, 1), states, *args[2:], **kwargs)
    return (_repeated(output, time, steps), *states)


def _repeated(output: Tensor, time: int, steps: int) -> Tensor:
    repeats = [1] * output.dim()
    repeats[time] = steps
    return output.repeat(repeats)
