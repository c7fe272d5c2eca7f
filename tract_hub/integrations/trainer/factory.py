"""``optimizer_factory``: the Trainer's own optimizer, and TrAct on the model that it is for."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from tract_hub.config import Scope, TractConfig
from tract_hub.errors import TractError, TractWarning
from tract_hub.integrations.trainer.resume import track
from tract_hub.integrations.trainer.stem_group import StemGroup, StemOptimizer
from tract_hub.stem import Stem
from tract_hub.surgery import disable, enable, status, stem_parameters

if TYPE_CHECKING:
    from transformers import TrainingArguments


def optimizer_factory(
    args: TrainingArguments,
    lam: float = 0.1,
    scope: Scope = "rank",
    stems: Sequence[str | Stem] | None = None,
    example_inputs: Any = None,
    stem_lr: float | None = None,
    stem_weight_decay: float | None = None,
    stem_optimizer: StemOptimizer | None = None,
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """Make the ``optimizer_cls_and_kwargs`` of a Trainer that trains its model with TrAct.

        Trainer(..., args=args, optimizer_cls_and_kwargs=tract_hub.optimizer_factory(args))

    When the Trainer asks for its optimizer, TrAct is enabled on the model that it trains (with
    ``model_init``, on each new one), and the optimizer is the one that the Trainer would have made
    of ``args``: ``--optim``, ``--optim_args``, learning rate, betas, groups of weight decay.

    Under ``scope="rank"``, each micro-batch of gradient accumulation has its own Gram matrix.

    Args:
        args: the Trainer's own.
        lam: the damping λ > 0.
        scope: whose rows the Gram matrix is taken over, see ``enable``.
        stems: names of the first layers, where they should not be searched for.
        example_inputs: inputs to follow the pixels with, see ``locate``.
        stem_lr: learning rate of the first layers' weights, in place of ``args.learning_rate``.
            The scheduler scales it as it does the other.
        stem_weight_decay: weight decay of the first layers' weights.
        stem_optimizer: an optimizer of their own: ``"sgd"`` (momentum 0.9), or a class with its
            keyword arguments. The paper's ablation is SGD there and Adam elsewhere. To the Trainer
            it is one optimizer, in ``state_dict`` and to the scheduler too.

    Returns:
        What ``Trainer(optimizer_cls_and_kwargs=…)`` takes.

    Raises:
        ValueError: λ, the scope or a setting of the first layers is none that there is.
        TypeError: ``args`` are no ``TrainingArguments``.
        TractError: DeepSpeed is configured with an optimizer of its own. And when training
            begins, what ``enable`` raises.

    """
    TractConfig(lam, scope)
    _check_arguments(args)
    _refuse_foreign_optimizer(args)
    settings = {"lam": lam, "stems": stems, "scope": scope, "example_inputs": example_inputs}
    order = _Order(args, settings, StemGroup(stem_lr, stem_weight_decay, stem_optimizer))
    return OptimizerFactory, {"order": order}


class OptimizerFactory:
    """What the Trainer instantiates, and calls with its model."""

    def __call__(self, model: nn.Module, order: _Order) -> Optimizer:
        """Enable TrAct on the model; return the optimizer for it."""
        return order.fill(model)


class _Order:
    """An optimizer that was asked for; says so if it is never fetched."""

    def __init__(self, args: TrainingArguments, settings: dict[str, Any], group: StemGroup) -> None:
        self.args = args
        self.settings = settings
        self.group = group
        self._unused = weakref.finalize(self, _report_unused)

    def fill(self, model: nn.Module) -> Optimizer:
        from tract_hub.integrations.trainer.card import describe_in_cards

        self._unused.detach()
        describe_in_cards()
        before = status(model)
        enable(model, **self.settings)
        stems = chain.from_iterable(stem_parameters(model).values())
        try:
            optimizer = self.group.separate(_default_optimizer(self.args, model), stems)
        except Exception:
            if not before:
                disable(model)
            raise
        if self.args.deepspeed_plugin is None:
            track(optimizer, model)
        return optimizer


def _default_optimizer(args: TrainingArguments, model: nn.Module) -> Optimizer:
    """The optimizer of a Trainer without this factory, made by its own method."""
    from transformers import Trainer

    trainer = object.__new__(Trainer)  # all of a Trainer that its create_optimizer reads
    trainer.args = args
    trainer.optimizer = trainer.optimizer_cls_and_kwargs = None
    optimizer: Optimizer = trainer.create_optimizer(model)
    return optimizer


def _check_arguments(args: Any) -> None:
    from transformers import TrainingArguments

    if not isinstance(args, TrainingArguments):
        raise TypeError(
            "optimizer_factory takes the Trainer's TrainingArguments first, got "
            f"{type(args).__name__}"
        )


def _refuse_foreign_optimizer(args: TrainingArguments) -> None:
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and "optimizer" in plugin.hf_ds_config.config:
        raise TractError(
            "the DeepSpeed configuration has an optimizer of its own, which the Trainer uses "
            "instead of optimizer_factory: take 'optimizer' out of the configuration, or leave "
            "optimizer_factory out and pass callbacks=[TractCallback(lam=…)]"
        )


def _report_unused() -> None:
    warnings.warn(
        "no Trainer asked tract_hub.optimizer_factory for an optimizer, so it enabled TrAct on no "
        "model: trainer.optimizer was set, create_optimizer overridden, or nothing trained. "
        "TractCallback(lam=…) works with any optimizer",
        TractWarning,
        stacklevel=2,
    )
