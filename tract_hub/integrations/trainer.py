"""TrAct in the Trainer of Transformers: a callback, and an optimizer that brings TrAct along.

An enabled model needs neither: ``Trainer(tract_hub.enable(model), …)`` trains with TrAct.
"""

from __future__ import annotations

import functools
import inspect
import logging
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

import tract_hub
from tract_hub.config import Damping, Scope
from tract_hub.errors import TractError, TractWarning
from tract_hub.integrations.figures import figures, gradient_norms
from tract_hub.stem import Stem

Lam = float | Mapping[str, float]
OptimizerFactory = Callable[[], Callable[[nn.Module], Optimizer]]

UNUSED_FACTORY = (
    "no Trainer asked tract_hub.optimizer_factory for an optimizer, so it enabled TrAct on no "
    "model: trainer.optimizer was set, create_optimizer overridden, or nothing trained. "
    "TractCallback(lam=…) works with any optimizer"
)

logger = logging.getLogger(__name__)


class TractCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Enables TrAct on the model that a Trainer trains; logs it, and notes it in checkpoints.

    The Trainer's logs, wherever it reports them to, get ``tract/<layer>/lam`` and
    ``tract/<layer>/grad_norm``: the norm of the first layer's gradient that the optimizer stepped
    with, after clipping. Checkpoints keep λ, scope and damping in ``trainer_state.json``. A run
    that resumes with other settings says so once in the log.

    With ``scope="global"`` gradients are completed before the Trainer clips them. (Without this
    callback they are completed before the optimizer's step, after the clipping.)

    Args:
        lam: as in ``enable``, as are the arguments after it. None: keep what the model has when
            training begins, or take 0.1 if TrAct is not on it.

    Raises:
        TractError, ValueError: as ``enable``. Raised when the Trainer is made if ``lam`` is given,
            otherwise when training begins.

    Example:
        >>> Trainer(model=model, args=args, callbacks=[tract_hub.TractCallback(lam=0.1)], ...)

    """

    def __init__(
        self,
        lam: Lam | None = None,
        *,
        scope: Scope = "local",
        damping: Damping = "absolute",
        stems: Sequence[str | Stem] | None = None,
        pixels: Sequence[str] | None = None,
        example_inputs: Any = None,
    ) -> None:
        self._gradient: dict[str, Any] = {"scope": scope, "damping": damping}
        if lam is not None:
            self._gradient["lam"] = lam
        self._search = {"stems": stems, "pixels": pixels, "example_inputs": example_inputs}
        self._model: weakref.ref[nn.Module] | None = None
        self._weights: list[str] = []
        self._norms: dict[str, Tensor] = {}

    def on_init_end(self, args: Any, state: TrainerState, control: Any, **parts: Any) -> None:
        """Enable TrAct before anything is wrapped, compiled or sharded."""
        if "lam" in self._gradient:
            self._enable(parts["model"])

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **parts: Any) -> None:
        """Enable TrAct on a model made since; compare with a checkpoint; find the Trainer."""
        model = parts["model"]
        if not tract_hub.status(model):
            self._enable(model)
        self._model, present = weakref.ref(model), _settings_of(model)
        self._weights = list(present)
        # Of a run without this callback, a checkpoint has no entry for the Trainer to update.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, {"attributes": {}})
        before = saved["attributes"].get("noted", "no TractCallback")
        if state.global_step and before != present:
            logger.warning("resumed a run that had %s; it goes on with %s", before, present)
        trainer = _calling_trainer()
        # A Trainer puts the reporters before a user's callbacks: let them see the figures too.
        trainer.callback_handler.callbacks.remove(self)
        trainer.callback_handler.callbacks.insert(0, self)
        _finish_before_clipping(trainer.accelerator, model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Keep the norms of this step's gradients, without waiting for the device."""
        self._norms = gradient_norms(parts["model"], self._weights)

    def on_log(self, args: Any, state: TrainerState, control: Any, **parts: Any) -> None:
        """Add the figures to what the callbacks after this one report, and to the history."""
        if "loss" in parts["logs"]:
            values = figures(tract_hub.status(parts["model"]), self._norms)
            parts["logs"].update(values)
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **parts: Any) -> None:
        """Leave the Trainer as it was."""
        vars(_calling_trainer().accelerator).pop("clip_grad_norm_", None)

    def state(self) -> dict[str, Any]:
        """Return what the Trainer's checkpoints keep of this callback."""
        model = None if self._model is None else self._model()
        noted = {} if model is None else _settings_of(model)
        return {"args": self._gradient, "attributes": {"noted": noted}}

    def _enable(self, model: nn.Module) -> None:
        tract_hub.enable(model, **self._gradient, **self._search)


def _settings_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        stem.weight_name: {"lam": stem.lam, "scope": stem.scope, "damping": stem.damping}
        for stem in tract_hub.status(model)
    }


def _finish_before_clipping(accelerator: Any, model: nn.Module) -> None:
    """Complete gradients of ``scope="global"`` before this accelerator clips.

    A Trainer calls back only after clipping (``on_pre_optimizer_step``). It clips by its own
    accelerator's ``clip_grad_norm_``, so this one object gets another.
    """
    clip = type(accelerator).clip_grad_norm_

    def finish_and_clip(*args: Any, **kwargs: Any) -> Any:
        tract_hub.finish(model)
        return clip(accelerator, *args, **kwargs)

    accelerator.clip_grad_norm_ = finish_and_clip


def _calling_trainer() -> Trainer:
    """Return the Trainer that calls this callback or factory.

    Transformers 5 passes it to neither: they get the model, the optimizer and the data loaders, and
    none of these leads to the list of callbacks or to the accelerator.
    """
    for frame, _ in traceback.walk_stack(inspect.currentframe()):
        if isinstance(caller := frame.f_locals.get("self"), Trainer):
            return caller
    raise TractError("TractCallback and optimizer_factory are for a transformers.Trainer")


def optimizer_factory(
    args: TrainingArguments,
    lam: Lam = 0.1,
    *,
    scope: Scope = "local",
    damping: Damping = "absolute",
    stems: Sequence[str | Stem] | None = None,
    pixels: Sequence[str] | None = None,
    example_inputs: Any = None,
    stem_lr: float | None = None,
    stem_weight_decay: float | None = None,
) -> tuple[OptimizerFactory, dict[str, Any]]:
    """Make the ``optimizer_cls_and_kwargs`` of a Trainer that trains its model with TrAct.

    The optimizer is the Trainer's own for ``args``. When the Trainer asks for it, TrAct is enabled
    on the model that it trains (with ``model_init``, on each new one), and the Trainer gets a
    ``TractCallback`` if it has none.

    Args:
        args: the Trainer's own.
        lam: as in ``enable``.
        scope: as in ``enable``.
        damping: as in ``enable``.
        stems: as in ``enable``.
        pixels: as in ``enable``.
        example_inputs: as in ``enable``.
        stem_lr: learning rate of the first layers' weights, in place of ``args.learning_rate``;
            the scheduler scales it as it does the other.
        stem_weight_decay: weight decay of the first layers' weights.

    Returns:
        What ``Trainer(optimizer_cls_and_kwargs=…)`` takes.

    Raises:
        TractError: DeepSpeed is configured with an optimizer of its own. When training begins, as
            ``enable``.

    Warns:
        TractWarning: the Trainer never asked for the optimizer, so that TrAct was on no model.

    Example:
        >>> factory = tract_hub.optimizer_factory(args, lam=0.1)
        >>> Trainer(model=model, args=args, optimizer_cls_and_kwargs=factory, ...)

    """
    plugin = args.deepspeed_plugin
    if plugin is not None and "optimizer" in plugin.hf_ds_config.config:
        raise TractError(
            "the DeepSpeed configuration has an optimizer of its own, so the Trainer would not use "
            "optimizer_factory: take 'optimizer' out of it, or pass TractCallback(lam=…) instead"
        )
    own = {"lr": stem_lr, "weight_decay": stem_weight_decay}
    stem_group = {name: value for name, value in own.items() if value is not None}
    search = {"stems": stems, "pixels": pixels, "example_inputs": example_inputs}
    new_callback = functools.partial(TractCallback, lam, scope=scope, damping=damping, **search)

    def make(model: nn.Module) -> Optimizer:
        unused.detach()
        trainer, callback = _calling_trainer(), new_callback()
        callback._enable(model)
        if not any(isinstance(c, TractCallback) for c in trainer.callback_handler.callbacks):
            trainer.add_callback(callback)
        factory, trainer.optimizer_cls_and_kwargs = trainer.optimizer_cls_and_kwargs, None
        try:  # without a factory, a Trainer makes the optimizer of its arguments
            optimizer: Optimizer = Trainer.create_optimizer(trainer, model)
        finally:
            trainer.optimizer_cls_and_kwargs = factory
        if stem_group:
            _group_stems(optimizer, model, stem_group)
        return optimizer

    unused = weakref.finalize(make, warnings.warn, UNUSED_FACTORY, TractWarning)
    return lambda: make, {}  # a Trainer calls what is no class of optimizers, and the result


def _group_stems(optimizer: Optimizer, model: nn.Module, settings: dict[str, float]) -> None:
    """Move the first layers' weights to groups of their own, with these settings."""
    weights = {id(model.get_parameter(stem.weight_name)) for stem in tract_hub.status(model)}
    for group in list(optimizer.param_groups):
        stems = [parameter for parameter in group["params"] if id(parameter) in weights]
        if stems:
            group["params"] = [p for p in group["params"] if id(p) not in weights]
            optimizer.add_param_group({**group, "params": stems, **settings})
