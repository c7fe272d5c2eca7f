"""``tract-hub bench``."""

from tract_hub.studies.bench.run import bench

__all__ = ["bench"]
