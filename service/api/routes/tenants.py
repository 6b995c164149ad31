"""`/tenants`: who there is, and with which classes."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Response

from service.access.authentication import named_tenant
from service.access.idempotency import digest_of
from service.api.dependencies import KeyDep, LedgerDep, RoomsDep
from service.api.pagination import CursorDep, LimitDep, cursor_key, cursor_of
from service.api.problems import may
from service.api.responses import json_answer, response_of
from service.api.schemas.base import TenantName, Text
from service.api.schemas.tenants import AddClassesIn, TenantIn, TenantNameOut, TenantOut, TenantsOut, specs
from service.api.security import Guarded
from service.domain.records import Remembered
from service.tenants import configuration, encoder_routing

router = APIRouter(prefix="/tenants", tags=["tenants"], route_class=Guarded)


@router.get("", summary="List the tenants")
async def list_tenants(rooms: RoomsDep, limit: LimitDep = 100, cursor: CursorDep = None) -> TenantsOut:
    """Return a page of tenants, by name."""
    after = "" if cursor is None else cursor_key(cursor)
    names = list(await rooms.store.names(after=after, limit=limit + 1))
    more = cursor_of(names[limit - 1]) if len(names) > limit else None
    return TenantsOut(items=[TenantNameOut(tenant=name) for name in names[:limit]], next=more)


@router.put(
    "/{tenant}",
    summary="Create or replace a tenant",
    responses={201: {"model": TenantOut}, **may("duplicate-class")},
)
async def put_tenant(rooms: RoomsDep, tenant: TenantName, body: TenantIn, response: Response) -> TenantOut:
    """Create a tenant (201) or replace its configuration (200); classes that stay keep their memories."""
    put = partial(configuration.put_tenant, name=tenant, config=body.config())
    changed = await encoder_routing.in_its_rooms(rooms, named_tenant(tenant, None), put)
    response.status_code = 201 if changed.created else 200
    return _told(changed)


@router.get("/{tenant}", summary="Look at a tenant")
async def get_tenant(rooms: RoomsDep, tenant: TenantName) -> TenantOut:
    """Return a tenant's configuration."""
    record = await rooms.archive.record(named_tenant(tenant, None))
    return TenantOut.of(record.name, record.config)


@router.delete("/{tenant}", status_code=204, summary="Remove a tenant and its memories")
async def delete_tenant(rooms: RoomsDep, tenant: TenantName) -> None:
    """Remove a tenant with all that it has; the default one comes back without classes."""
    name = named_tenant(tenant, None)
    await configuration.delete_tenant(await encoder_routing.rooms_of(rooms, name), name)


@router.post(
    "/{tenant}/classes",
    status_code=201,
    response_model=TenantOut,
    summary="Add classes",
    responses=may("duplicate-class"),
)
async def add_classes(
    rooms: RoomsDep, ledger: LedgerDep, tenant: TenantName, body: AddClassesIn, key: KeyDep = None
) -> Response:
    """Add classes while running; the others keep their memories."""
    name = named_tenant(tenant, None)
    digest = digest_of(("classes", body.as_bytes()))

    async def once() -> Remembered:
        add = partial(configuration.add_classes, tenant=name, added=specs(body.classes))
        changed = await encoder_routing.in_its_rooms(rooms, name, add)
        return json_answer(_told(changed), digest, 201)

    return response_of(await ledger.once(name, key, digest, once, wait_s=rooms.settings.deadline_ms / 1000))


@router.delete(
    "/{tenant}/classes/{name:path}",
    status_code=204,
    summary="Remove a class and its memories",
    responses=may("unknown-class"),
)
async def remove_class(rooms: RoomsDep, tenant: TenantName, name: Text) -> None:
    """Remove a class while running; the others keep their memories."""
    own = named_tenant(tenant, None)
    await encoder_routing.in_its_rooms(rooms, own, partial(configuration.remove_class, tenant=own, name=name))


def _told(changed: configuration.Changed) -> TenantOut:
    return TenantOut.of(changed.record.name, changed.record.config, changed.job)
