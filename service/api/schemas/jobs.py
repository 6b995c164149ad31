"""Models of the job routes."""

from __future__ import annotations

from typing import Any, Literal

from service.domain.records import Job

from .base import ResponseModel


class JobOut(ResponseModel):
    """Long work in the background; `progress` from 0 to 1, `eta_s` in seconds, `error` a problem."""

    id: str
    kind: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: float
    eta_s: float | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    @staticmethod
    def of(job: Job) -> JobOut:
        """Return what a caller sees of a job."""
        return JobOut(
            id=job.id,
            kind=job.kind,
            state=job.state.value,
            progress=job.progress,
            eta_s=job.eta_s,
            result=None if job.result is None else dict(job.result),
            error=None if job.error is None else dict(job.error),
        )


class JobListOut(ResponseModel):
    """A page of a tenant's latest jobs, the newest first."""

    items: list[JobOut]
    next: str | None
