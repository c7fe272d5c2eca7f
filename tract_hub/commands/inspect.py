"""``tract-hub inspect``."""

from tract_hub.studies.inspect import inspect

__all__ = ["inspect"]
