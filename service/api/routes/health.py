"""Probes, metrics and what is running. None of them needs a key but `/metrics`, once keys are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

import torch
from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service import health
from service.api.dependencies import RoomsDep
from service.api.schemas.health import CheckOut, LiveOut, ReadyOut, VersionOut
from service.api.security import Guarded
from service.services import Rooms

router = APIRouter(tags=["health"], route_class=Guarded)


@router.get("/livez", summary="Whether the process is alive", responses={503: {"model": LiveOut}})
async def live(rooms: RoomsDep, response: Response) -> LiveOut:
    """Return 200, also while the service drains, unless the process should be started anew, with the reason."""
    checks = _told(health.liveness(rooms))
    fine = all(one.ok for one in checks.values())
    response.status_code = 200 if fine else 503
    return LiveOut(live=fine, checks=checks)


@router.get("/readyz", summary="Whether traffic may be sent here", responses={503: {"model": ReadyOut}})
async def ready(rooms: RoomsDep, response: Response) -> ReadyOut:
    """Return 200 if images can be classified now, else 503, with each reason.

    While the store is away, they can be where answers go on from hot memories and there are any; but not where keys
    are asked for, which cannot be looked up then.
    """
    fine, checks = await health.readiness(rooms)
    response.status_code = 200 if fine else 503
    return ReadyOut(ready=fine, checks=_told(checks))


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(rooms: RoomsDep) -> Response:
    """Return all metrics in Prometheus's text format."""
    measure(rooms)
    return Response(generate_latest(rooms.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/version", summary="What is running")
async def show_version(rooms: RoomsDep) -> VersionOut:
    """Return the versions of the service and of its encoder."""
    return VersionOut(
        version=version("dmn-clip-service"),
        encoder=rooms.encoder.name,
        fingerprint=rooms.encoder.fingerprint,
        device=str(rooms.encoder.device),
        store=rooms.settings.store_kind,
    )


def measure(rooms: Rooms) -> None:
    """Measure what is measured when somebody looks."""
    device = rooms.encoder.device
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    rooms.metrics.device_bytes.set(held)


def _told(checks: Mapping[str, health.Check]) -> dict[str, CheckOut]:
    return {name: CheckOut(ok=one.ok, detail=one.detail) for name, one in checks.items()}
