"""Every error and warning that tract_hub raises of its own, and how it quotes those of others."""

from __future__ import annotations


class TractError(Exception):
    """Something TrAct cannot do; the message says what was found and what to pass."""


class StemNotFoundError(TractError):
    """No layer of the model reads the pixels in a way that TrAct can treat."""


class UnsupportedStemError(TractError):
    """A first layer was found, and cannot be treated exactly."""


class ExampleInputError(TractError):
    """The model could not be traced with the inputs at hand."""


class TractWarning(UserWarning):
    """Something a user of TrAct should know; training goes on."""


class StudyError(TractError):
    """A study was asked for something that cannot be run; the message says what to change."""


class SettingsError(StudyError):
    """An option of a study has a value that makes no sense, or contradicts another."""


class DataError(StudyError):
    """The images or labels cannot be found, read, or trained on."""


class ModelError(StudyError):
    """The model cannot be found, built, or run on the images at hand."""


def first_line(error: BaseException) -> str:
    """Return the first line of any error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
