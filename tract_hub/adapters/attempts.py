"""Run a skeleton on example inputs until one forward comes to its end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tract_hub.adapters.search import ShapeSearch
from tract_hub.adapters.tracing.dataflow import Trace, follow_pixels
from tract_hub.adapters.tracing.skeleton import training
from tract_hub.adapters.zoos.examples import Example, given_example
from tract_hub.adapters.zoos.lookup import examples_for
from tract_hub.errors import ExampleInputError


@dataclass(frozen=True)
class Attempt:
    """One forward of a skeleton.

    Attributes:
        skeleton: the model without its weights.
        example: what it was run on.
        trace: what that showed.

    """

    skeleton: nn.Module
    example: Example
    trace: Trace

    def again(self) -> Attempt:
        """Run the same forward once more."""
        return _Runner(self.skeleton, []).run(self.example)


def follow(model: nn.Module, skeleton: nn.Module, example_inputs: Any = None) -> Attempt:
    """Find inputs that a model takes, and follow its pixels through one forward.

    Args:
        model: the model itself.
        skeleton: its ``meta_skeleton``.
        example_inputs: the user's inputs; they are not varied. None to guess.

    Raises:
        ExampleInputError: no forward came to its end.

    """
    guess = example_inputs is None
    examples = examples_for(model) if guess else iter([given_example(model, example_inputs)])
    runner = _Runner(skeleton, [*model.parameters(), *model.buffers()])
    failures: list[Trace] = []
    unused: Attempt | None = None
    for example in examples:
        attempt = _varied(runner, example) if guess else runner.run(example)
        if attempt.trace.ended is not None:
            failures.append(attempt.trace)
        elif attempt.trace.layers or not guess:
            return _in_both_modes(attempt, runner.live)
        else:  # a forward may do without the pixels that another choice of inputs makes it use
            unused = unused or attempt
    if unused:
        return _in_both_modes(unused, runner.live)
    raise ExampleInputError(_why(model, failures, guess)) from failures[0].ended


def _in_both_modes(attempt: Attempt, live: list[Tensor]) -> Attempt:
    """Add what a forward in training mode shows: it is the one that TrAct acts in.

    Where it does not come to its end, as without labels, the other has to do.
    """
    with training(attempt.skeleton):
        trained = _Runner(attempt.skeleton, live).run(attempt.example).trace
    if trained.ended is None:
        attempt.trace.give_way_to(trained)
    return attempt


def _varied(runner: _Runner, example: Example) -> Attempt:
    """Run on these inputs, and then on other shapes of them, as each failure proposes."""
    search = ShapeSearch()
    first = attempt = runner.run(example)
    while attempt.trace.ended is not None and not example.fixed:
        proposed = search.next(attempt.example, attempt.trace.mismatch)
        if proposed is None:
            return first  # its message is about a shape that the model's zoo or layers declare
        attempt = runner.run(proposed)
    return attempt


@dataclass(frozen=True)
class _Runner:
    skeleton: nn.Module
    live: list[Tensor]
    traces: dict[int, tuple[Example, Trace]] = field(default_factory=dict)

    def run(self, example: Example) -> Attempt:
        whole = Trace()
        for call in (example, *example.also):
            whole.add(self._trace(call))
            if whole.ended:
                break
        return Attempt(self.skeleton, example, whole)

    def _trace(self, call: Example) -> Trace:
        """Trace one call, only once however many examples share it."""
        key = id(call.kwargs) if call.kwargs else id(call)
        if key not in self.traces:  # keeps the call too: its id must not be used again
            with _environment(call.environment):
                trace = follow_pixels(
                    self.skeleton, call.args, call.kwargs, call.pixels, self.live, call.method
                )
            self.traces[key] = call, trace
        return self.traces[key][1]


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _why(model: nn.Module, failures: list[Trace], guess: bool) -> str:
    name = type(model).__name__
    for trace in failures:
        if trace.looked_up:
            return (
                f"{name} looks its input up in {trace.looked_up!r}, so it takes indices, not "
                "pixels: pass the inputs that hold pixels as example_inputs=…"
            )
    error = failures[0].ended
    message = str(error).strip().partition("\n")[0] or type(error).__name__
    inputs = "the inputs guessed for it" if guess else "the example_inputs given"
    return (
        f"{name} could not be run on {inputs} ({message}): pass example_inputs=… as its forward "
        "takes them, or name its first layers with stems=[…]"
    )
