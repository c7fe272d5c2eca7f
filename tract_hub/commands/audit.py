"""``tract-hub audit``."""

from tract_hub.studies.audit.run import audit

__all__ = ["audit"]
