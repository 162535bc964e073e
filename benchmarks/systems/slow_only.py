"""Slow-only networks for video of every system: see ``vcr_ops.models.slow_only``."""

from vcr_ops.models.slow_only import make_slow_only as slow_only

__all__ = ["slow_only"]
