"""``TractCallback``: TrAct on a Trainer's model, whatever its optimizer, and in its logs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from tract_hub.config import Scope, TractConfig
from tract_hub.errors import TractError
from tract_hub.integrations.trainer.card import describe_in_cards
from tract_hub.integrations.trainer.measurement import Measurement
from tract_hub.integrations.trainer.resume import (
    lam_of,
    report_change,
    track,
    was_compared,
)
from tract_hub.stem import Stem
from tract_hub.surgery import enable, status


class TractCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Enables TrAct on the model that a Trainer trains, and logs what it does.

    For a Trainer with an optimizer of the user's own, or a subclass that makes one; with
    ``optimizer_factory``, for the logs. At each logging step these join the Trainer's own, in
    ``trainer.state.log_history`` and wherever it reports to, for each first layer:

    - ``tract/<layer>/grad_norm_before``, ``grad_norm_after``: norm of the ordinary gradient of its
      weight and of TrAct's, before clipping;
    - ``tract/<layer>/gram_condition``: condition number of the damped Gram matrix;
    - ``tract/<layer>/damping``: λ, or what it had to be raised to.

    They are measured in the step that is logged (with ``logging_strategy="epoch"``, in the epoch's
    first step): under ``scope="rank"`` in its first micro-batch, whose loss counts 1/k of k; under
    ``"global"`` over all of its micro-batches, the Gram matrix being that of all processes. The
    norms are those of each process, before gradients are averaged. The other steps are as without.
    ``torch.compile`` compiles a second graph, for the steps with.

    Args:
        lam: the damping λ > 0. None: that which the model has when training begins, or 0.1.
        scope: whose rows the Gram matrix is taken over, see ``enable``.
        stems: names of the first layers, where they should not be searched for.
        example_inputs: inputs to follow the pixels with, see ``locate``.

    Raises:
        ValueError: λ or the scope is none that there is.
        TractError: when the Trainer is made (λ given) or training begins: what ``enable`` raises,
            or that something else set another λ than this callback's.

    """

    def __init__(
        self,
        lam: float | None = None,
        scope: Scope = "rank",
        stems: Sequence[str | Stem] | None = None,
        example_inputs: Any = None,
    ) -> None:
        self.lam = lam
        config = TractConfig(scope=scope) if lam is None else TractConfig(lam, scope)
        self.settings = {
            "lam": config.lam,
            "scope": config.scope,
            "stems": stems,
            "example_inputs": example_inputs,
        }
        self._model: nn.Module | None = None
        self._measurement: Measurement | None = None
        self._epoch_begins = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Enable TrAct before anything is wrapped or compiled."""
        _log_with_callbacks()
        describe_in_cards()
        if self.lam is not None:
            enable(parts["model"], **self.settings)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Enable it on a model that was made since."""
        model = self._model = parts["model"]
        self._enable(model)
        optimizer = _innermost(parts.get("optimizer"))
        if state.global_step and not was_compared(optimizer):
            self._compare(state, lam_of(model))
        # A Trainer that resumes from a run without this callback would look for its entry.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if optimizer is not None and args.deepspeed_plugin is None:
            track(optimizer, model)

    def state(self) -> dict[str, Any]:
        """Return what the Trainer's checkpoints keep of this callback."""
        lam = self.lam if self._model is None else lam_of(self._model)
        return {"args": {}, "attributes": {"trained_with": lam}}

    def _compare(self, state: TrainerState, lam: float | None) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None:
            report_change(f"a run without {type(self).__name__}", lam)
        elif (before := saved["attributes"]["trained_with"]) != lam:
            report_change(f"a run with TrAct, λ={before:g}", lam)

    def _enable(self, model: nn.Module) -> None:
        present = status(model)
        if not present:
            enable(model, **self.settings)
        elif self.lam is not None and present[0].lam != self.lam:
            raise TractError(
                f"TractCallback(lam={self.lam:g}), but something else enabled TrAct with "
                f"λ={present[0].lam:g} on the same model: pass both the same, or TractCallback()"
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Note it."""
        self._epoch_begins = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Measure if this step will be logged."""
        if self._measurement is not None:
            self._measurement.stop()  # an out-of-memory error skipped that
        if self._will_be_logged(args, state):
            self._measurement = Measurement(parts["model"])
        self._epoch_begins = False

    def _will_be_logged(self, args: TrainingArguments, state: TrainerState) -> bool:
        step = state.global_step + 1
        if step == 1 and args.logging_first_step:
            return True
        if args.logging_strategy == "epoch":
            return self._epoch_begins
        return bool(args.logging_strategy == "steps" and step % state.logging_steps == 0)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Measure one micro-batch: the first, or the last if only that knows the step's rows."""
        if self._measurement is None or not self._measurement.running:
            return
        self._measurement.stop(parts.get("optimizer"))
        if status(parts["model"])[0].scope == "global":
            self._measurement = Measurement(parts["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Measure no more, with or without accumulation."""
        if self._measurement is not None:
            self._measurement.stop(parts.get("optimizer"))

    def measured(self) -> dict[str, float]:
        """Return what was measured since this was asked for last."""
        measurement, self._measurement = self._measurement, None
        return {} if measurement is None else measurement.values()


def _innermost(optimizer: Any) -> Optimizer | None:
    """The torch optimizer in the wrappers of Accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, Optimizer) else None


def _log_with_callbacks() -> None:
    """Let ``Trainer.log`` ask the callbacks first: what they add in ``on_log`` comes too late."""
    ordinary = Trainer.log
    if hasattr(ordinary, "asks_callbacks"):
        return

    @functools.wraps(ordinary)
    def log(self: Trainer, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TractCallback) and "loss" in logs:
                logs.update(callback.measured())
        ordinary(self, logs, *args, **kwargs)

    log.asks_callbacks = True  # type: ignore[attr-defined]
    Trainer.log = log
