"""``tract-hub audit``."""

from tract_hub.studies.audit import audit

__all__ = ["audit"]
