"""A line about TrAct in the model cards that a Trainer writes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from tract_hub.surgery import status

HEADING = "The following hyperparameters were used during training:\n"


def describe_in_cards() -> None:
    """Let ``Trainer.create_model_card`` add the line where TrAct is on the model."""
    from transformers import Trainer

    ordinary = Trainer.create_model_card
    if hasattr(ordinary, "describes_tract"):
        return

    @functools.wraps(ordinary)
    def create_model_card(self: Trainer, *args: Any, **kwargs: Any) -> None:
        ordinary(self, *args, **kwargs)
        if self.is_world_process_zero() and status(self.model):
            _insert(Path(self.args.output_dir) / "README.md", card_line(self.model))

    create_model_card.describes_tract = True  # type: ignore[attr-defined]
    Trainer.create_model_card = create_model_card


def card_line(model: nn.Module) -> str:
    """Say in Markdown how the first layers of a model are trained; TrAct is on it."""
    states = status(model)
    weights = ", ".join(f"`{state.weight_name}`" for state in states)
    return (
        f"- tract: the gradient of {weights} is that of [TrAct](https://arxiv.org/abs/2410.23970) "
        f"(λ={states[0].lam:g}, scope={states[0].scope})\n"
    )


def _insert(card: Path, line: str) -> None:
    text = card.read_text(encoding="utf-8")
    before, heading, after = text.partition(HEADING)
    text = before + heading + line + after if heading else f"{text}\n{line}"
    card.write_text(text, encoding="utf-8")
