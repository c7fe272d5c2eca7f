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
    failures: list[Trace] = []
    for runner in _runners(model):
        unused: Attempt | None = None
        for example in _examples(model, example_inputs, pixels):
            attempt = runner.varied(example)
            if attempt.trace.ended is not None:
                failures.append(attempt.trace)
            elif attempt.trace.layers:
                return attempt
            else:  # a forward may do without the pixels that other inputs make it use
                unused = unused or attempt
        if unused:
            return unused
    refuse_scripted(model)
    furthest = max(failures, key=lambda trace: len(trace.layers)).ended
    name, message = type(model).__name__, first_line(furthest) if furthest else ""
    inputs = "the inputs guessed for it" if example_inputs is None else "the example_inputs given"
    why = f"{name} could not be run on {inputs} ({message})"
    looked_up = next((trace.looked_up for trace in failures if trace.looked_up), None)
    if looked_up:
        why = f"{name} looks its input up in {looked_up!r}, so it takes indices, not pixels"
    raise ExampleInputError(f"{why}: {ADVICE}") from furthest


@dataclass
class _Runner:
    """Runs a copy of a model on examples, of which several may share a call."""

    model: nn.Module
    copied: nn.Module
    traces: dict[int, tuple[Example, Trace]] = field(default_factory=dict)

    def varied(self, example: Example) -> Attempt:
        """Run on these inputs, and then on other shapes: as failures propose, and usual ones."""
        if example.fixed:
            return self.run(example)
        given = tuple(example.pixels[0].shape)
        sides = USUAL_SIDES if len(given) - example.channel_axis >= 3 else ()
        failed: list[Attempt] = []
        for start in (given, *((*given[:-2], side, side) for side in sides)):
            shape: Shape | None = start
            search = ShapeSearch(example.channel_axis)
            while shape is not None:
                attempt = self.run(reshaped(example, shape))
                if attempt.trace.ended is None:
                    return attempt
                failed.append(attempt)
                shape = search.next(shape, attempt.trace.mismatch)
        return failed[0]  # its message is about a shape that the model's zoo or layers declare

    def run(self, example: Example) -> Attempt:
        """Run one example."""
        whole = Trace()
        for call in (example, *example.also):
            key = id(call.kwargs)
            if key not in self.traces:  # keeps the call too: its id must not be used again
                self.traces[key] = call, follow_pixels(self.model, self.copied, call)
            whole.add(self.traces[key][1])
            if whole.ended is not None:
                break
        return Attempt(self.copied, example, whole)


def _runners(model: nn.Module) -> Iterator[_Runner]:
    """Yield what runs the model in training mode, in which TrAct acts, and then in eval mode.

    In eval mode a forward needs no labels, and takes a batch of one. Only if both fail are the
    user's hooks called.
    """
    for user_hooks in (False, True) if has_user_hooks(model) else (False,):
        copied = meta_copy(model, user_hooks)
        for training in (True, False):
            for module in copied.modules():
                module.training = training
            yield _Runner(model, copied)


def _examples(
    model: nn.Module, example_inputs: Any, pixels: Sequence[str | int] | None
) -> Iterator[Example]:
    proposed = examples_for(model)
    if example_inputs is not None:
        own_names = getattr(zoo_of(model), "PIXELS", None)
        proposed = iter([given_example(model, example_inputs, own_names)])
    unknown: ExampleInputError | None = None
    for example in proposed:
        try:
            yield marked(model, example, pixels)
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


USUAL_SIDES = (64, 32, 128, 192, 256, 299, 384, 448, 512)
"""Sides of images, where no failure tells which is wanted: vit-pytorch's MobileViT and ScalableViT
raise errors of their own, pytorchcv's InceptionV4 is left with an image of no pixels."""

ATTEMPTS = 20
"""Forwards for one guess of the inputs: a signal of 16,000 steps is halved fourteen times."""

_USUAL, _LARGEST = 32, 2048
"""Most images' sides are multiples of the first, none is longer than the second."""

_MOST_CHANNELS = 1_000_000
"""What scales the channels further does not read them."""

Shape = tuple[int, ...]


class ShapeSearch:
    """Proposes other shapes of the pixels, from what the last forward wanted."""

    def __init__(self, channel_axis: int) -> None:
        self._axis = channel_axis
        self._tried: set[Shape] = set()
        self._too_small = 0  # sides
        self._too_large = _LARGEST + 1

    def next(self, shape: Shape, mismatch: Mismatch | None) -> Shape | None:
        """Return the shape to try after this one, None where there is nothing to go by."""
        self._tried.add(shape)
        if mismatch is not None and not mismatch.of_features:
            proposed = self._other_channels(shape, mismatch)
        else:
            proposed = self._other_size(shape, mismatch)
        done = proposed in self._tried or len(self._tried) == ATTEMPTS
        return None if done else proposed

    def _other_size(self, shape: Shape, mismatch: Mismatch | None) -> Shape | None:
        """Scale the side as the mismatch tells, or halve the sides that are left; round first.

        A failure without a mismatch is taken for a kernel larger than what is left of the image.
        """
        side, space = shape[-1], shape[max(self._axis + 1, len(shape) - 2) :]
        if not space or (mismatch is None and self._too_large > _LARGEST):
            return None
        if mismatch is None or mismatch.got < mismatch.wanted:
            self._too_small = side
        else:
            self._too_large = side
        ratio = mismatch.wanted / mismatch.got if mismatch else 1.0
        scaled, middle = side * ratio ** (1 / len(space)), (self._too_small + self._too_large) // 2
        for new in (round(scaled / _USUAL) * _USUAL, round(scaled), middle):
            if self._too_small < new < self._too_large:
                # a clip keeps its length, an image or a signal its proportions
                return (*shape[: -len(space)], *(new * length // side for length in space))
        return None

    def _other_channels(self, shape: Shape, mismatch: Mismatch) -> Shape | None:
        """Scale the channels; or the layer reads the whole image, or its channels are last."""
        axis = self._axis
        channels, remainder = divmod(shape[axis] * mismatch.wanted, mismatch.got)
        if remainder == 0 and 0 < channels <= _MOST_CHANNELS:
            return (*shape[:axis], channels, *shape[axis + 1 :])
        # Channels that the forward adds: coordinates (CoordConv), perceiver-pytorch's positions.
        added = mismatch.got - mismatch.wanted
        if 0 < added < shape[axis]:
            return (*shape[:axis], shape[axis] - added, *shape[axis + 1 :])
        if len(shape) - axis != 3:
            return None
        last = shape[-1] - added
        if mismatch.got == shape[-1] or last == shape[axis]:
            return (*shape[:axis], *shape[axis + 1 :], last)
        for count in (shape[axis], 3, 1):
            side = math.isqrt(mismatch.wanted // count)
            if side * side * count == mismatch.wanted:
                return (*shape[:axis], count, side, side)
        return None


def reshaped(example: Example, shape: Shape) -> Example:
    """Return the example with pixels of another shape."""
    new = {id(pixels): pixels.new_empty(shape) for pixels in example.pixels}
    args, kwargs, pixels = tree_map_only(
        Tensor,
        lambda tensor: new.get(id(tensor), tensor),
        (example.args, dict(example.kwargs), example.pixels),
    )
    return replace(example, args=args, kwargs=kwargs, pixels=pixels)
