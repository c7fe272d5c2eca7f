"""Run the locator over one model of a zoo and say in one short record what came out."""

from __future__ import annotations

import importlib
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from tract_hub.locator.locate import locate
from tract_hub.locator.zoos.lookup import declared_stems
from tract_hub.errors import TractError
from tract_hub.studies.models.named import build_without_weights

Builder = Callable[[], nn.Module]
Record = dict[str, Any]


@lru_cache
def models_of(zoo: str) -> dict[str, Builder]:
    """Return the names and builders of a zoo, such as ``"timm"``."""
    return dict(importlib.import_module(f"tract_hub.studies.audit.{zoo}_zoo").zoo())


def audit_model(zoo: str, name: str, time_limit: float) -> Record:
    """Build one model without its weights, and locate its first layers.

    Args:
        zoo: where the model is from.
        name: its name there.
        time_limit: seconds after which it counts as failed.

    Returns:
        ``name``; ``result``: ``"exact"``, ``"multiple"``, ``"refused"``, ``"failed"`` or
        ``"not built"``; the ``stems``, or the ``reason``; and what the zoo had ``declared``, where
        that is not what was found.

    """
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _limited(time_limit):
                return {"name": name, **_audited(models_of(zoo)[name])}
        except _OutOfTime as error:
            return {"name": name, "result": "failed", "reason": str(error)}


def _audited(builder: Builder) -> Record:
    try:
        model = build_without_weights(builder)
    except Exception as error:
        return {"result": "not built", "reason": _short(error)}
    try:
        return _found(model)
    except TractError as error:
        return {"result": "refused", "reason": _short(error)}
    except Exception as error:
        return {"result": "failed", "reason": _short(error)}


def _found(model: nn.Module) -> Record:
    stems = [stem.weight_name for stem in locate(model)]
    record: Record = {"result": "exact" if len(stems) == 1 else "multiple", "stems": stems}
    declared = declared_stems(model)
    if declared is not None and sorted(declared) != stems:
        record["declared"] = sorted(declared)
    return record


class _OutOfTime(BaseException):
    """No ``Exception``: a trace takes those for a forward that failed, and tries another."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _OutOfTime(f"not done after {seconds:g} s")

    if not hasattr(signal, "setitimer"):  # Windows: no limit
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
