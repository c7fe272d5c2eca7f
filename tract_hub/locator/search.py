"""Run a copy of a model on inputs until one forward comes to its end.

A forward that fails tells what it wanted: channels, where a layer read the pixels, or a number of
features or positions, where the image had another size than the model was made for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tract_hub.errors import ExampleInputError, UnsupportedStemError, first_line
from tract_hub.locator.graph import Kind
from tract_hub.locator.meta_copy import has_user_hooks, meta_copy
from tract_hub.locator.mismatch import Mismatch
from tract_hub.locator.trace import Trace, follow_pixels
from tract_hub.locator.zoos.examples import Example, given_example, inputs_of, marked
from tract_hub.locator.zoos.lookup import examples_for, zoo_of

ADVICE = (
    "name the layers to treat with stems=[…], or pass the inputs that its forward takes as "
    "example_inputs=…, and which of them are images as pixels=(…)"
)


@dataclass(frozen=True)
class Attempt:
    """One forward of a copy of a model.

    Attributes:
        copied: the model without its weights.
        example: what it was run on.
        trace: what that showed.

    """

    copied: nn.Module
    example: Example
    trace: Trace

    def again(self) -> None:
        """Run the same forward once more."""
        _Runner(self.copied, self.copied, []).run(self.example)


def follow(
    model: nn.Module, example_inputs: Any = None, pixels: Sequence[str | int] | None = None
) -> Attempt:
    """Find inputs that a model takes, and follow its pixels through one forward.

    Args:
        model: the model itself.
        example_inputs: the user's inputs; they are not varied. None to guess.
        pixels: names of those that are pixels, or their positions. None to guess.

    Raises:
        ExampleInputError: no forward came to its end.
        UnsupportedStemError: nor could it, for a part of the model is scripted.

    """
    guess = example_inputs is None
    failures: list[Trace] = []
    for user_hooks in (False, True) if has_user_hooks(model) else (False,):
        runner = _Runner.on(model, user_hooks)
        unused: Attempt | None = None
        for example in _examples(model, example_inputs, pixels):
            attempt = runner.varied(example) if guess else runner.run(example)
            if attempt.trace.ended is not None:
                failures.append(attempt.trace)
            elif attempt.trace.layers or not guess:
                return attempt
            else:  # a forward may do without the pixels that other inputs make it use
                unused = unused or attempt
        if unused:
            return unused
    refuse_scripted(model)
    raise ExampleInputError(_why(model, failures, guess)) from failures[0].ended


@dataclass
class _Runner:
    """Runs a copy of a model on examples.

    Attributes:
        model: the model itself.
        copied: its ``meta_copy``.
        live: its parameters and buffers.
        traces: what each call showed: several examples may share one.
        fails_alike: whether a forward failed in both modes.

    """

    model: nn.Module
    copied: nn.Module
    live: list[Tensor]
    traces: dict[tuple[int, bool], tuple[Example, Trace]] = field(default_factory=dict)
    fails_alike: bool = False

    @classmethod
    def on(cls, model: nn.Module, user_hooks: bool) -> _Runner:
        return cls(model, meta_copy(model, user_hooks), [*model.parameters(), *model.buffers()])

    def run(self, example: Example) -> Attempt:
        """Run one example: in training mode, in which TrAct acts, else in eval mode.

        In eval mode a forward needs no labels, and takes a batch of one.
        """
        trained = None if self.fails_alike else self._run(example, training=True)
        if trained and (trained.trace.ended is None or trained.trace.mismatch is not None):
            return trained
        attempt = self._run(example, training=False)
        if attempt.trace.ended is not None:
            self.fails_alike = True  # it is not for the mode: first find inputs that fit
        elif trained is None:
            trained = self._run(example, training=True)
            return trained if trained.trace.ended is None else attempt
        return attempt

    def varied(self, example: Example) -> Attempt:
        """Run on these inputs, and then on other shapes of them, as each failure proposes."""
        search = ShapeSearch()
        first = attempt = self.run(example)
        while attempt.trace.ended is not None and not example.fixed:
            proposed = search.next(attempt.example, attempt.trace.mismatch)
            if proposed is None:
                return first  # its message is about a shape that the model's zoo or layers declare
            attempt = self.run(proposed)
        return attempt

    def _run(self, example: Example, training: bool) -> Attempt:
        for module in self.copied.modules():
            module.training = training
        whole = Trace()
        for call in (example, *example.also):
            whole.add(self._trace(call, training))
            if whole.ended is not None:
                break
        return Attempt(self.copied, example, whole)

    def _trace(self, call: Example, training: bool) -> Trace:
        key = id(call.kwargs) if call.kwargs else id(call), training
        if key not in self.traces:  # keeps the call too: its id must not be used again
            function = attrgetter(call.method)(self.model)
            pixels = {i.name: i.tensor for i in inputs_of(function, call) if i.is_in(call.pixels)}
            frozen = frozenset(n for n, p in self.model.named_parameters() if not p.requires_grad)
            trace = follow_pixels(self.copied, call, pixels, frozen, self.live)
            self.traces[key] = call, trace
        return self.traces[key][1]


def _examples(
    model: nn.Module, example_inputs: Any, pixels: Sequence[str | int] | None
) -> Iterator[Example]:
    if example_inputs is not None:
        own_names = getattr(zoo_of(model), "PIXELS", None)
        yield given_example(model, example_inputs, pixels, own_names)
        return
    unknown: ExampleInputError | None = None
    for example in examples_for(model):
        if pixels is not None:
            try:
                example = marked(
                    inputs_of(attrgetter(example.method)(model), example), example, pixels
                )
            except ExampleInputError as error:  # another way to call the model may have them
                unknown = unknown or error
                continue
        yield example
    if unknown:
        raise unknown


def refuse_scripted(model: nn.Module) -> None:
    """Say where nothing was found since a module is scripted: its calls cannot be seen.

    Raises:
        UnsupportedStemError: there is such a module.

    """
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise UnsupportedStemError(
            f"{type(model).__name__}: {scripted[0] or 'it'} is torch.jit.script-ed, so nothing can "
            f"look into it: call enable before scripting; or {ADVICE}"
        )


def _why(model: nn.Module, failures: list[Trace], guess: bool) -> str:
    name = type(model).__name__
    for trace in failures:
        if trace.looked_up:
            return (
                f"{name} looks its input up in {trace.looked_up!r}, so it takes indices, not "
                f"pixels: {ADVICE}"
            )
    error = failures[0].ended
    message = first_line(error) if error else ""
    inputs = "the inputs guessed for it" if guess else "the example_inputs given"
    return f"{name} could not be run on {inputs} ({message}): {ADVICE}"


ATTEMPTS = 16
"""Forwards for one guess of the inputs: a size between 1 and 1024 is halved ten times."""

_USUAL, _LARGEST = 32, 2048
"""Most images' sides are multiples of the first, none is longer than the second."""

Point = tuple[int, float]


class ShapeSearch:
    """Proposes other shapes of the pixels, from what the last forward wanted."""

    def __init__(self) -> None:
        self._left = ATTEMPTS
        self._tried: set[tuple[int, ...]] = set()
        self._smaller: Point | None = None  # the largest size that was too small, and its extent
        self._larger: Point | None = None
        self._goal = math.nan

    def next(self, example: Example, mismatch: Mismatch | None) -> Example | None:
        """Return the inputs to try after these, None where there is nothing to go by."""
        shapes = {tuple(pixels.shape) for pixels in example.pixels}
        self._left -= 1
        if len(shapes) != 1 or self._left <= 0:
            return None
        (shape,) = shapes
        self._tried.add(shape)
        if mismatch is not None and mismatch.kind is not Kind.FEATURES:
            proposed = _other_channels(shape, mismatch, example.channel_axis)
        else:
            proposed = self._other_size(shape, mismatch, example.channel_axis)
        if proposed is None or proposed in self._tried:
            return None
        return reshaped(example, proposed)

    def _other_size(
        self, shape: tuple[int, ...], mismatch: Mismatch | None, axis: int
    ) -> tuple[int, ...] | None:
        if len(shape) - axis < 2:
            return None
        size = shape[-1]
        if mismatch is None:  # such as a kernel larger than what is left of the image
            if self._larger is None or size >= self._larger[0]:
                return None
            self._smaller = (size, math.nan)
            goal = self._goal
        else:
            goal = _extent(mismatch.wanted, shape, axis)
            if goal != self._goal:  # another layer's wish: what was too small for it is not known
                self._goal, self._smaller, self._larger = goal, None, None
            self._narrow((size, _extent(mismatch.got, shape, axis)), goal)
        for proposed in self._between(goal):
            # a clip keeps its length, an image or a signal its proportions
            space = tuple(proposed * s // size for s in shape[max(axis + 1, len(shape) - 2) :])
            whole = (*shape[: len(shape) - len(space)], *space)
            if whole not in self._tried:
                return whole
        return None

    def _narrow(self, point: Point, goal: float) -> None:
        if point[1] < goal:
            self._smaller = point
        else:
            self._larger = point

    def _between(self, goal: float) -> Iterator[int]:
        """Interpolate between the two sides, or scale the only one there is; round sizes first."""
        low, high = self._smaller, self._larger
        if low and high:
            slope = (high[1] - low[1]) / (high[0] - low[0])
            size = low[0] + (goal - low[1]) / slope if slope > 0 else (low[0] + high[0]) / 2
        elif low or high:
            known = low or high or (1, 1.0)
            size = known[0] * goal / known[1]
        else:
            return
        least, most = low[0] + 1 if low else 1, high[0] - 1 if high else _LARGEST
        if least <= most:
            exact = min(max(round(size), least), most)
            tidy = round(exact / _USUAL) * _USUAL
            yield from (tidy, exact) if least <= tidy <= most else (exact,)


def reshaped(example: Example, shape: tuple[int, ...]) -> Example:
    """Return the example with pixels of another shape."""
    new = {
        id(pixels): torch.empty(shape, dtype=pixels.dtype, device="meta")
        for pixels in example.pixels
    }

    def swap(tensor: Tensor) -> Tensor:
        return new.get(id(tensor), tensor)

    args, kwargs, pixels = tree_map_only(
        Tensor, swap, (example.args, dict(example.kwargs), example.pixels)
    )
    return replace(example, args=args, kwargs=kwargs, pixels=pixels)


def _extent(features: int, shape: tuple[int, ...], axis: int) -> float:
    """The side of a square of so many positions; a signal has one side."""
    return float(features) if len(shape) - axis == 2 else math.sqrt(features)


def _other_channels(
    shape: tuple[int, ...], mismatch: Mismatch, axis: int
) -> tuple[int, ...] | None:
    """Scale the channels; or the layer reads the whole image, or its channels are last."""
    channels, remainder = divmod(shape[axis] * mismatch.wanted, mismatch.got)
    if remainder == 0 and channels > 0:
        return (*shape[:axis], channels, *shape[axis + 1 :])
    if len(shape) - axis != 3:
        return None
    if mismatch.got == shape[-1]:
        return (*shape[:axis], *shape[axis + 1 :], mismatch.wanted)
    for count in dict.fromkeys((shape[axis], 3, 1)):
        side = math.isqrt(mismatch.wanted // count)
        if side * side * count == mismatch.wanted:
            return (*shape[:axis], count, side, side)
    return None
