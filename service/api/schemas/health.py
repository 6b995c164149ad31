"""Models of the health routes."""

from __future__ import annotations

from .base import ResponseModel


class CheckOut(ResponseModel):
    """One reason for being ready or not."""

    ok: bool
    detail: str


class ReadyOut(ResponseModel):
    """Whether traffic may be sent here, and why."""

    ready: bool
    checks: dict[str, CheckOut]


class LiveOut(ResponseModel):
    """Whether the process is alive, and why."""

    live: bool
    checks: dict[str, CheckOut]


class VersionOut(ResponseModel):
    """What is running."""

    version: str
    encoder: str
    fingerprint: str
    device: str
    store: str
