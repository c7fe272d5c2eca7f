"""Run an unmodified training script with TrAct on the models that it trains on images.

    python -m tract_hub.launch [options] script.py arguments…
    accelerate launch … -m tract_hub.launch [options] script.py arguments…
    torchrun … -m tract_hub.launch [options] script.py arguments…

When the script ends, one line on stderr says which models got TrAct, and how many optimizer steps
used it. A step used it if a forward in training mode applied it before. The exit status is the
script's own if that is not 0, 2 if the command is wrong, and 3 if no step used TrAct.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args
from unittest.mock import patch
from weakref import WeakKeyDictionary, WeakSet

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
from tract_hub.config import Damping, Scope, Settings
from tract_hub.errors import ExampleInputError, StemNotFoundError, TractError
from tract_hub.locator.unwrap import unwrap
from tract_hub.stem import Stem

UNUSED = 3  # the exit status
NO_MODEL = (
    "no module with parameters that a torch optimizer of this process holds was trained on images "
    "(start processes with torchrun or accelerate launch; with optimizers that are not torch's, "
    "call tract_hub.enable(model) in the script)"
)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a script with TrAct, and exit.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    """
    options, settings = _parsed(arguments)
    watch = ScriptWatch(settings, options.model)
    status: Any = None
    try:
        with watch.watching():
            run_script(options.script, options.arguments, options.module)
    except SystemExit as end:
        status = end.code
    finally:
        if os.environ.get("RANK", "0") == "0":  # one line from a launcher's many processes
            print("tract_hub.launch:", *str(watch).split(), file=sys.stderr, flush=True)
    used = any(training.used for training in watch.trainings.values())
    raise SystemExit(status or (0 if used else UNUSED))


def _parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(
        prog="tract_hub.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--lam", type=float, help="damping λ (default: 0.1)")
    add("--scope", choices=get_args(Scope), help="whose rows the Gram matrix is taken over")
    add("--damping", choices=get_args(Damping), help="whether λ is relative to the mean square")
    add("--model", metavar="NAME", help="the one to treat: class, variable, or module inside")
    add("-m", "--module", action="store_true", help="the script is a module's name")
    add("script")
    add("arguments", nargs=argparse.REMAINDER, help="of the script").required = False
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("lam", "scope", "damping")}
    settings = {name: value for name, value in given.items() if value is not None}
    try:
        Settings(**settings)
    except ValueError as error:
        parser.error(str(error))
    script = Path(options.script)
    if not (options.module or script.is_file() or (script / "__main__.py").exists()):
        parser.error(f"there is no script {options.script}; its own options stand after it")
    return options, settings


def run_script(name: str, arguments: Sequence[str], as_module: bool = False) -> None:
    """Run a script as ``python name arguments`` would, or a module as ``python -m name`` would.

    ``__main__``, ``sys.argv`` and the first entry of ``sys.path`` are the script's while it runs.
    What the script raises, ``SystemExit`` included, is passed on.
    """
    folder = Path.cwd() if as_module else Path(name).resolve().parent
    is_safe = getattr(sys.flags, "safe_path", False)  # python -P; Python 3.10 has no such flag
    path = list(sys.path) if is_safe else [str(folder), *sys.path[1:]]
    with patch.object(sys, "argv", [name, *arguments]), patch.object(sys, "path", path):
        if as_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")


@dataclass
class Training:
    """The training of a model with TrAct, or of several alike, as in folds."""

    name: str  # of the model's class
    stems: Status  # when TrAct was enabled
    models: int = 0
    steps: int = 0  # of optimizers that hold weights of the first layers
    used: int = 0  # those of the steps before which a forward applied TrAct

    def __str__(self) -> str:
        first = self.stems[0]
        names = ", ".join(stem.weight_name for stem in self.stems)
        damping = "relative " if first.damping == "relative" else ""
        scope = ", scope global," if first.scope == "global" else ""
        count = f"{self.models} × " if self.models > 1 else ""
        return (
            f"TrAct {damping}λ={first.lam:g}{scope} on {names} of {count}{self.name}: "
            f"{self.used} of {self.steps} optimizer steps used it"
        )


class ScriptWatch:
    """Gives TrAct to the models that a script trains on images.

    What a script trains is what its optimizers hold. So the outermost module that is called in
    training mode, on images, with parameters that an optimizer holds, is a model that is trained,
    whoever built it and whatever wraps it. It gets TrAct just before that call, and its first
    layers are found with the inputs of that call. A teacher, a copy that averages weights, and a
    head on another model's features are no such modules.

    Args:
        settings: those of ``enable`` that were asked for.
        name: the one model to treat: its class, its variable in ``__main__``, or the path of a
            module inside it. None: all that are trained on images.

    Attributes:
        trainings: those with TrAct, by the model's class and first layers.
        left: name of a model that is trained and did not get TrAct → why.

    """

    def __init__(self, settings: Mapping[str, Any], name: str | None = None) -> None:
        self.settings = settings
        self.name = name
        self.trainings: dict[tuple[str, Status], Training] = {}
        self.left: dict[str, str] = {}
        self._others: set[str] = set()
        self._training_of: WeakKeyDictionary[nn.Module, Training] = WeakKeyDictionary()
        # The `id` of what optimizers were made with: ZeRO puts shards in the place of parameters
        # later, and torch.utils.swap_tensors refuses tensors with weak references.
        self._made_with: WeakKeyDictionary[Optimizer, set[int]] = WeakKeyDictionary()
        self._waiting: WeakSet[Optimizer] = WeakSet()  # for their first step
        self._seen: WeakSet[nn.Module] = WeakSet()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what the code inside trains.

        Calls are watched from the making of an optimizer until every optimizer has made a step.
        Meanwhile ``Optimizer.__init__`` and ``nn.Module.__call__`` are replaced in this process: an
        unmodified script offers no other place. (Torch's hooks on the forwards of all modules would
        do for the calls, but they do not get keyword arguments.)
        """
        init, call = Optimizer.__init__, nn.Module.__call__

        @functools.wraps(init)
        def noted_init(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            init(optimizer, *args, **kwargs)
            self._made_with[optimizer] = set(map(id, _parameters(optimizer)))
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

        with (
            patch.object(Optimizer, "__init__", noted_init),
            patch.object(nn.Module, "__call__", call),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ):
            yield

    def __str__(self) -> str:
        """Say which models got TrAct and which did not, or why none did."""
        if self.trainings:
            left = (f"not on {name}: {why}" for name, why in self.left.items())
            return "; ".join([*map(str, self.trainings.values()), *left])
        why = "; ".join(f"{name}: {why}" for name, why in self.left.items())
        if not why and self._others:
            others = " and ".join(sorted(self._others))
            why = f"the script trains no model {self.name!r}, but {others}"
        return f"TrAct was not used: {why or NO_MODEL}"

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """End the run before a step without TrAct, unless another optimizer has yet to step."""
        last = set(self._waiting) == {optimizer}
        if last and not self.trainings and _has_gradients(optimizer):
            raise SystemExit(UNUSED)  # not an error, which the script might catch

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Count the step, if it is one of a model with TrAct."""
        held = self._held_by(optimizer)
        for model, training in self._training_of.items():
            forwards = [forward for _, forward in stem_forwards(model)]
            if any(id(weight) in held for forward in forwards for weight in forward.weights()):
                training.steps += 1
                training.used += any(forward.used for forward in forwards)
                for forward in forwards:
                    forward.used = False
        if _has_gradients(optimizer):  # some scripts make an empty step first
            self._waiting.discard(optimizer)

    def _look_at(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Enable TrAct on a module that is called, if it is a model that is trained on images."""
        held = {optimizer: self._held_by(optimizer) for optimizer in self._made_with}
        in_optimizers = set().union(*held.values())
        trained = {p for p in root.parameters() if p.requires_grad and id(p) in in_optimizers}
        if not trained or root in self._seen or not torch.is_grad_enabled():
            return
        tensors = _floating_tensors((args, kwargs))
        if self.name is None and (not tensors or any(t.requires_grad for t in tensors)):
            return  # token ids, or features that another model made
        model = unwrap(root)[0]
        name, part = type(model).__name__, self._part_of(model)
        ids = set(map(id, trained))
        trains_another = any(ids.isdisjoint(held[optimizer]) for optimizer in self._waiting)
        if part is None:
            self._others.add(name)
        elif not model.training:
            self.left[name] = (
                "it is trained in eval mode, in which TrAct leaves the gradient as it is; let the "
                "script call model.train(), and .eval() on layers that must be in eval mode"
            )
        elif self.name is None and trains_another and not any(map(_is_image, tensors)):
            self._seen.add(root)
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
            self.left[name] = (
                f"its input {shapes} may be noise, as another optimizer trains another model; if "
                f"it is images, pass --model {name}"
            )
        else:
            self._seen.update(root.modules())
            self.left.pop(name, None)
            try:
                self._enable(model, part, trained, _inputs_of(model, args, kwargs))
            except TractError as error:
                self.left[name] = str(error).removeprefix(f"{name}: ")

    def _part_of(self, model: nn.Module) -> str | None:
        """Return the path of the module inside a model that was asked for; "" is the model."""
        variable: Any = getattr(sys.modules["__main__"], str(self.name), None)
        if self.name in (None, type(model).__name__) or unwrap(variable)[0] is model:
            return ""
        return self.name if self.name in dict(model.named_modules()) else None

    def _enable(self, model: nn.Module, part: str, trained: set[nn.Parameter], inputs: Any) -> None:
        if not tract_hub.status(model):
            stems = _trained_stems(model, part, trained, inputs)
            tract_hub.enable(model, stems=stems, **self.settings)
        elif self.settings:
            options = ", ".join(f"--{name}" for name in self.settings)
            raise TractError(f"the script itself enables TrAct on it: leave {options} out")
        key = type(model).__name__, tract_hub.status(model)
        training = self.trainings.setdefault(key, Training(*key))
        training.models += 1
        self._training_of[model] = training

    def _held_by(self, optimizer: Optimizer) -> set[int]:
        """Return the ``id`` of the parameters that an optimizer has, or was made with."""
        return {*map(id, _parameters(optimizer)), *self._made_with.get(optimizer, ())}


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


def _inputs_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a call's inputs as ``locate`` takes them: a tuple, or a mapping if some are named."""
    names = inspect.signature(model.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs} if kwargs else args


def _trained_stems(
    model: nn.Module, part: str, trained: set[nn.Parameter], inputs: Any
) -> list[Stem]:
    """Find the first layers in a part of a model that are trained."""
    try:
        found = tract_hub.locate(model, inputs)
    except ExampleInputError:  # as where a loss reads the values of the labels: ask the zoo
        found = tract_hub.locate(model)
    inside = set(model.get_submodule(part).modules())
    reading = [stem for stem in found if stem.module in inside]
    stems = [stem for stem in reading if model.get_parameter(stem.weight_name) in trained]
    if not reading:
        raise StemNotFoundError(f"no layer of {part} reads the pixels")
    if not stems:
        names = " and ".join(stem.weight_name for stem in reading)
        raise StemNotFoundError(f"{names} reads the pixels, but is frozen or in no optimizer")
    return stems


if __name__ == "__main__":
    main()
