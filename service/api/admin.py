"""`/admin`: what empties memories."""

from __future__ import annotations

from fastapi import APIRouter, Response

from .. import adapt
from ..idempotency import digest_of
from ..stores.base import Remembered
from .deps import KeyDep, LedgerDep, RoomsDep, TenantDep, json_answer, response_of, stamp_out
from .schemas import ResetIn, ResetOut

router = APIRouter(prefix="/admin", tags=["admin"])


@router.post("/memory/reset", response_model=ResetOut, summary="Empty the memories")
async def reset(rooms: RoomsDep, ledger: LedgerDep, tenant: TenantDep, body: ResetIn, key: KeyDep = None) -> Response:
    """Empty the dynamic memory, the static one or both, of some classes or of all."""
    digest = digest_of(("reset", body.model_dump_json()))

    async def once() -> Remembered:
        stamp = await adapt.reset(
            rooms,
            tenant,
            dynamic=body.scope in ("dynamic", "all"),
            static=body.scope in ("static", "all"),
            classes=body.classes,
        )
        return json_answer(ResetOut(tenant=tenant, memory=stamp_out(stamp)), digest)

    return response_of(await ledger.once(tenant, key, digest, once, wait_s=rooms.settings.deadline_ms / 1000))
