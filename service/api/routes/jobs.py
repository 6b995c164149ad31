"""`/jobs`: long work in the background."""

from __future__ import annotations

from fastapi import APIRouter

from service.api.dependencies import RoomsDep, TenantDep
from service.api.pagination import CursorDep, LimitDep, page
from service.api.problems import may
from service.api.schemas.jobs import JobListOut, JobOut
from service.api.security import Guarded

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=Guarded)


@router.get("", summary="List the latest jobs")
async def list_jobs(rooms: RoomsDep, tenant: TenantDep, limit: LimitDep = 100, cursor: CursorDep = None) -> JobListOut:
    """Return a page of the tenant's latest jobs, the newest first."""
    jobs = (await rooms.jobs.every(tenant))[::-1]
    part, more = page(jobs, limit, cursor, lambda job: job.id)
    return JobListOut(items=[JobOut.of(job) for job in part], next=more)


@router.get("/{job}", summary="Look at a job", responses=may("unknown-job"))
async def get_job(rooms: RoomsDep, tenant: TenantDep, job: str) -> JobOut:
    """Return how a job stands."""
    return JobOut.of(await rooms.jobs.get(tenant, job))


@router.delete("/{job}", status_code=204, summary="Cancel a job", responses=may("unknown-job"))
async def cancel_job(rooms: RoomsDep, tenant: TenantDep, job: str) -> None:
    """Cancel a job; one that is over stays as it is."""
    await rooms.jobs.cancel(tenant, job)
