"""Run a training script as it is, and give TrAct to the models that it trains on images.

What a script trains is what its optimizers hold. So the outermost module that is called in training
mode, on images, with parameters that an optimizer holds, is a model that is trained, whoever built
it and whatever wraps it. It gets TrAct just before that call, and its first layers are found with
the inputs of that call. A teacher, a copy that averages weights, and a head on another model's
features are no such modules.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import runpy
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._pytree import tree_leaves

import tract_hub
from tract_hub.attach import Status, stem_forwards
from tract_hub.errors import ExampleInputError, StemNotFoundError, TractError
from tract_hub.locator.unwrap import unwrap
from tract_hub.stem import Stem

IN_EVAL_MODE = (
    "it is trained in eval mode, in which TrAct leaves the gradient as it is; let the script call "
    "model.train(), and .eval() on those layers that must be in eval mode"
)
NO_IMAGE = (
    "its input {shapes} may be noise, as another optimizer trains another model; if it is images, "
    "pass --model {name}"
)


def run_script(name: str, arguments: Sequence[str], as_module: bool = False) -> None:
    """Run a script as ``python name arguments`` would, or a module as ``python -m name`` would.

    ``__main__``, ``sys.argv`` and the first entry of ``sys.path`` are the script's while it runs.
    What the script raises, ``SystemExit`` included, is passed on.
    """
    argv, path = sys.argv, list(sys.path)
    folder = Path.cwd() if as_module else Path(name).resolve().parent
    sys.argv = [name, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # python -P; Python 3.10 has no such flag
        sys.path[0] = str(folder)
    try:
        if as_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


@dataclass
class TrainedModel:
    """A model that got TrAct.

    Attributes:
        name: its class.
        stems: its first layers, with their settings.
        model: the model, as long as the script keeps it.
        optimizers: those that hold the weights of its first layers.
        steps: steps of these optimizers.
        used: those of the steps before which a forward applied TrAct.

    """

    name: str
    stems: Status
    model: weakref.ref[nn.Module]
    optimizers: weakref.WeakSet[Optimizer]
    steps: int = 0
    used: int = 0

    def count(self, optimizer: Optimizer) -> None:
        """Count a step of an optimizer, if it is one of this model's."""
        model = self.model()
        if model is not None and optimizer in self.optimizers:
            forwards = [forward for _, forward in stem_forwards(model)]
            self.steps += 1
            self.used += any(forward.used for forward in forwards)
            for forward in forwards:
                forward.used = False


class ScriptWatch:
    """Gives TrAct to the models that the code inside ``with ScriptWatch(…)`` trains on images.

    Calls are watched from the making of an optimizer until every optimizer has made a step.
    Meanwhile ``Optimizer.__init__`` and ``nn.Module.__call__`` are replaced in this process: an
    unmodified script offers no other place. (Torch's hooks on the forwards of all modules would do
    for the calls, but they do not get keyword arguments.)

    Args:
        settings: those of ``enable`` that were asked for.
        name: the one model to treat: its class, its variable in ``__main__``, or the path of a
            module inside it. None: all that are trained on images.

    Attributes:
        treated: the models that got TrAct.
        left: name of a model that is trained and did not get TrAct → why.
        failure: why the run was ended.

    """

    def __init__(self, settings: Mapping[str, Any], name: str | None = None) -> None:
        self.settings = settings
        self.name = name
        self.treated: list[TrainedModel] = []
        self.left: dict[str, str] = {}
        self.failure: TractError | None = None
        self._other_names: set[str] = set()
        # What optimizers were made with: ZeRO puts shards in the place of parameters later.
        self._made_with: weakref.WeakKeyDictionary[Optimizer, list[weakref.ref[Tensor]]]
        self._made_with = weakref.WeakKeyDictionary()
        self._waiting: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # for their first step
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._ordinary_call = nn.Module.__call__
        self._undo = ExitStack()

    def __enter__(self) -> ScriptWatch:
        init, call = Optimizer.__init__, self._ordinary_call

        @functools.wraps(init)
        def noted_init(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            init(optimizer, *args, **kwargs)
            self._made_with[optimizer] = [weakref.ref(p) for p in _parameters(optimizer)]
            self._waiting.add(optimizer)
            nn.Module.__call__ = watched_call  # type: ignore[method-assign]

        @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
        def watched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # Inside of the outermost call the ordinary one is in place: no compiler traces this.
            nn.Module.__call__ = call  # type: ignore[method-assign]
            try:
                self._look_at(module, args, kwargs)
                return call(module, *args, **kwargs)
            finally:
                if self._waiting:
                    nn.Module.__call__ = watched_call  # type: ignore[method-assign]

        Optimizer.__init__ = noted_init  # type: ignore[assignment, method-assign]
        self._undo.callback(setattr, Optimizer, "__init__", init)
        self._undo.callback(setattr, nn.Module, "__call__", call)
        self._undo.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        self._undo.callback(register_optimizer_step_post_hook(self._after_step).remove)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._undo.close()

    def why_none(self) -> str:
        """Say why no model got TrAct."""
        if self.left:
            return "; ".join(f"{name}: {why}" for name, why in self.left.items())
        if self._other_names:
            others = " and ".join(sorted(self._other_names))
            return f"the script trains no model {self.name!r}, but {others}"
        return (
            "no module with parameters that a torch optimizer of this process holds was trained on "
            "images (start processes with torchrun or accelerate launch; with optimizers that are "
            "not torch's, call tract_hub.enable(model) in the script)"
        )

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """End the run before a step without TrAct, unless another optimizer has yet to step."""
        last = set(self._waiting) == {optimizer}
        if last and not self.treated and _has_gradients(optimizer):
            self.failure = TractError(self.why_none())
            raise self.failure

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for model in self.treated:
            model.count(optimizer)
        if _has_gradients(optimizer):  # some scripts make an empty step first
            self._waiting.discard(optimizer)
        if not self._waiting:
            nn.Module.__call__ = self._ordinary_call  # type: ignore[method-assign]

    def _look_at(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Enable TrAct on a module that is called, if it is a model that is trained on images."""
        held = {optimizer: set(map(id, self._held_by(optimizer))) for optimizer in self._made_with}
        trained = set().union(*held.values())
        own = {id(parameter) for parameter in root.parameters()} & trained
        if not own or root in self._seen or not torch.is_grad_enabled():
            return
        model = unwrap(root)[0]
        name = type(model).__name__
        tensors = _floating_tensors((args, kwargs))
        if self.name is None and (not tensors or any(t.requires_grad for t in tensors)):
            return  # token ids, or features that another model made
        if self.name and not (self._is_named(model) or self.name in dict(model.named_modules())):
            self._other_names.add(name)
        elif not model.training:
            self.left[name] = IN_EVAL_MODE
        elif (
            self.name is None
            and not any(map(_is_image, tensors))
            and any(own.isdisjoint(held[optimizer]) for optimizer in self._waiting)
        ):
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
            self.left[name] = NO_IMAGE.format(shapes=shapes, name=name)
        else:
            self._seen.update(root.modules())
            self.left.pop(name, None)
            try:
                self._enable(model, _example_inputs(model, args, kwargs), trained)
            except TractError as error:
                self.left[name] = str(error).removeprefix(f"{name}: ")

    def _is_named(self, model: nn.Module) -> bool:
        variable = vars(sys.modules["__main__"]).get(str(self.name))
        is_it = isinstance(variable, nn.Module) and unwrap(variable)[0] is model
        return is_it or type(model).__name__ == self.name

    def _enable(self, model: nn.Module, inputs: Any, trained: set[int]) -> None:
        if not tract_hub.status(model):
            found = self._trained_stems(model, _locate(model, inputs), trained)
            tract_hub.enable(model, stems=found, **self.settings)
        elif self.settings:
            options = ", ".join(f"--{name}" for name in self.settings)
            raise TractError(f"the script itself enables TrAct on it: leave {options} out")
        stems = tract_hub.status(model)
        weights = {id(model.get_parameter(stem.weight_name)) for stem in stems}
        holders = weakref.WeakSet(
            optimizer
            for optimizer in self._made_with
            if any(id(parameter) in weights for parameter in self._held_by(optimizer))
        )
        self.treated.append(TrainedModel(type(model).__name__, stems, weakref.ref(model), holders))

    def _trained_stems(
        self, model: nn.Module, found: Sequence[Stem], trained: set[int]
    ) -> list[Stem]:
        """Return the first layers that an optimizer trains, in the part that was asked for."""
        part = f"{self.name}." if self.name and not self._is_named(model) else ""
        stems = [stem for stem in found if stem.weight_name.startswith(part)]
        if not stems:
            raise StemNotFoundError(f"no layer of {self.name} reads the pixels")
        weights = [model.get_parameter(stem.weight_name) for stem in stems]
        held = [weight.requires_grad and id(weight) in trained for weight in weights]
        if not any(held):
            names = " and ".join(stem.weight_name for stem in stems)
            raise StemNotFoundError(f"{names} reads the pixels, but is frozen or in no optimizer")
        return list(itertools.compress(stems, held))

    def _held_by(self, optimizer: Optimizer) -> Iterator[Tensor]:
        yield from _parameters(optimizer)
        parameters = (reference() for reference in self._made_with[optimizer])
        yield from (parameter for parameter in parameters if parameter is not None)


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for parameter in _parameters(optimizer))


def _floating_tensors(inputs: Any) -> list[Tensor]:
    """Return the tensors among inputs that may be pixels."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return [t for t in tensors if t.is_floating_point() or t.dtype == torch.uint8]


def _is_image(tensor: Tensor) -> bool:
    """Whether two axes besides the batch's are longer than 1: a GAN's noise has one."""
    return sum(size > 1 for size in tensor.shape[1:]) > 1


def _example_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a call's inputs as ``locate`` takes them: a tuple, or a mapping if some are named."""
    if not kwargs:
        return args
    signature = inspect.signature(model.forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            return args
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _locate(model: nn.Module, inputs: Any) -> Sequence[Stem]:
    """Find the first layers with the script's inputs, or else with those that the zoo knows."""
    with torch.autocast("cpu", enabled=False):
        try:
            return tract_hub.locate(model, inputs)
        except ExampleInputError as error:
            try:
                return tract_hub.locate(model)
            except ExampleInputError:
                raise error from None
