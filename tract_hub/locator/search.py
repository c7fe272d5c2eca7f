"""Run a copy of a model on inputs until one forward comes to its end.

A forward that fails tells what it wanted: channels, where a layer read the pixels, or a number of
features or positions, where the image had another size than the model was made for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tract_hub.errors import ExampleInputError, UnsupportedStemError, first_line
from tract_hub.locator.meta_copy import has_user_hooks, meta_copy
from tract_hub.locator.mismatch import Mismatch
from tract_hub.locator.trace import Trace, follow_pixels
from tract_hub.locator.zoos.examples import Example, given_example, marked
from tract_hub.locator.zoos.lookup import examples_for, zoo_of

ADVICE = (
    "name the layers to treat with stems=[…], or pass the inputs that its forward takes as "
    "example_inputs=…, and which of them are images as pixels=(…)"
)


@dataclass(frozen=True)
class Attempt:
    """One forward of a copy of a model: what it was run on, and what that showed."""

    copied: nn.Module
    example: Example
    trace: Trace

    def again(self) -> None:
        """Run the same forward once more."""
        _Runner(self.copied, self.copied).run(self.example)


def follow(
    model: nn.Module, example_inputs: Any = None, pixels: Sequence[str | int] | None = None
) -> Attempt:
    """Find inputs that a model takes, and follow its pixels through one forward.

    A user's ``example_inputs`` are not varied. ``pixels`` names those that are pixels, or their
    positions. None of either: they are guessed.
    """
    guess = example_inputs is None
    failures: list[Trace] = []
    for user_hooks in (False, True) if has_user_hooks(model) else (False,):
        runner = _Runner(model, meta_copy(model, user_hooks))
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
    furthest = max(failures, key=lambda trace: len(trace.layers))
    raise ExampleInputError(_why(model, failures, furthest.ended, guess)) from furthest.ended


@dataclass
class _Runner:
    """Runs a copy of a model on examples, of which several may share a call."""

    model: nn.Module
    copied: nn.Module
    traces: dict[tuple[int, bool], tuple[Example, Trace]] = field(default_factory=dict)
    fails_in_both_modes: bool = False

    def run(self, example: Example) -> Attempt:
        """Run one example: in training mode, in which TrAct acts, else in eval mode.

        In eval mode a forward needs no labels, and takes a batch of one.
        """
        trained = None if self.fails_in_both_modes else self._run(example, training=True)
        if trained and (trained.trace.ended is None or trained.trace.mismatch is not None):
            return trained
        attempt = self._run(example, training=False)
        if attempt.trace.ended is not None:
            self.fails_in_both_modes = True  # it is not for the mode: first find inputs that fit
        elif trained is None:
            trained = self._run(example, training=True)
            return trained if trained.trace.ended is None else attempt
        return attempt

    def varied(self, example: Example) -> Attempt:
        """Run on these inputs, and then on other shapes: as failures propose, and usual ones."""
        first = attempt = self._searched(example)
        shapes = {tuple(pixels.shape) for pixels in example.pixels}
        for side in USUAL_SIDES if len(shapes) == 1 and not example.fixed else ():
            (shape,) = shapes
            if attempt.trace.ended is None or len(shape) - example.channel_axis < 3:
                break
            attempt = self._searched(reshaped(example, (*shape[:-2], side, side)))
        # The first one's message is about a shape that the model's zoo or layers declare.
        return attempt if attempt.trace.ended is None else first

    def _searched(self, example: Example) -> Attempt:
        """Run on these inputs, and then on other shapes of them, as each failure proposes."""
        search = ShapeSearch()
        first = attempt = self.run(example)
        while attempt.trace.ended is not None and not example.fixed:
            proposed = search.next(attempt.example, attempt.trace.mismatch)
            if proposed is None:
                return first
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
            self.traces[key] = call, follow_pixels(self.model, self.copied, call)
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
        try:
            yield example if pixels is None else marked(model, example, pixels)
        except ExampleInputError as error:  # another way to call the model may have them
            unknown = unknown or error
    if unknown:
        raise unknown


def refuse_scripted(model: nn.Module) -> None:
    """Raise where a module is scripted, so that its calls cannot be seen."""
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise UnsupportedStemError(
            f"{type(model).__name__}: {scripted[0] or 'it'} is torch.jit.script-ed, so nothing can "
            f"look into it: call enable before scripting; or {ADVICE}"
        )


def _why(model: nn.Module, failures: list[Trace], error: Exception | None, guess: bool) -> str:
    name = type(model).__name__
    looked_up = next((trace.looked_up for trace in failures if trace.looked_up), None)
    if looked_up:
        return (
            f"{name} looks its input up in {looked_up!r}, so it takes indices, not pixels: {ADVICE}"
        )
    message = first_line(error) if error else ""
    inputs = "the inputs guessed for it" if guess else "the example_inputs given"
    return f"{name} could not be run on {inputs} ({message}): {ADVICE}"


USUAL_SIDES = (64, 32, 128, 256, 299, 384, 512)
"""Sides of images, where no failure tells which is wanted: vit-pytorch's MobileViT and ScalableViT
raise errors of their own, pytorchcv's InceptionV4 is left with an image of no pixels."""

ATTEMPTS = 20
"""Forwards for one guess of the inputs: a signal of 16,000 steps is halved fourteen times."""

_USUAL, _LARGEST = 32, 2048
"""Most images' sides are multiples of the first, none is longer than the second."""


class ShapeSearch:
    """Proposes other shapes of the pixels, from what the last forward wanted."""

    def __init__(self) -> None:
        self._tried: set[tuple[int, ...]] = set()
        self._too_small = 0  # sides
        self._too_large: int | None = None

    def next(self, example: Example, mismatch: Mismatch | None) -> Example | None:
        """Return the inputs to try after these, None where there is nothing to go by."""
        shapes = {tuple(pixels.shape) for pixels in example.pixels}
        if len(shapes) != 1 or len(self._tried) == ATTEMPTS:
            return None
        (shape,) = shapes
        self._tried.add(shape)
        if mismatch is not None and not mismatch.of_features:
            proposed = _other_channels(shape, mismatch, example.channel_axis)
        else:
            proposed = self._other_size(shape, mismatch, example.channel_axis)
        return None if proposed is None or proposed in self._tried else reshaped(example, proposed)

    def _other_size(
        self, shape: tuple[int, ...], mismatch: Mismatch | None, axis: int
    ) -> tuple[int, ...] | None:
        """Scale the side as the mismatch tells, or halve the sides that are left; round first.

        A failure without a mismatch is taken for a kernel larger than what is left of the image.
        """
        side, space = shape[-1], shape[max(axis + 1, len(shape) - 2) :]
        if not space or (mismatch is None and self._too_large is None):
            return None
        if mismatch is None or mismatch.got < mismatch.wanted:
            self._too_small = side
        else:
            self._too_large = side
        least, most = self._too_small + 1, (self._too_large or _LARGEST + 1) - 1
        if least > most:
            return None
        ratio = mismatch.wanted / mismatch.got if mismatch else 1.0
        proposed = round(side * ratio ** (1 / len(space)))
        if not least <= proposed <= most:
            proposed = (least + most) // 2
        tidy = round(proposed / _USUAL) * _USUAL
        proposed = tidy if least <= tidy <= most else proposed
        # a clip keeps its length, an image or a signal its proportions
        return (*shape[: -len(space)], *(proposed * length // side for length in space))


def reshaped(example: Example, shape: tuple[int, ...]) -> Example:
    """Return the example with pixels of another shape."""
    new = {id(pixels): pixels.new_empty(shape) for pixels in example.pixels}
    args, kwargs, pixels = tree_map_only(
        Tensor,
        lambda tensor: new.get(id(tensor), tensor),
        (example.args, dict(example.kwargs), example.pixels),
    )
    return replace(example, args=args, kwargs=kwargs, pixels=pixels)


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
