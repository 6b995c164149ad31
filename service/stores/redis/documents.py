"""Limits of job records."""

from __future__ import annotations

JOBS = 50
"""Jobs of a tenant that are remembered."""
UNFINISHED_S = 3600
