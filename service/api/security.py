"""Which route needs which scope, and what sees to it before anything of a request's body is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from service.access.api_keys import Scope
from service.access.authentication import Gate, named_tenant
from service.errors import Forbidden

from .request_params import headers_of

NEEDS: Mapping[str, Scope | None] = {
    "/classify": Scope.CLASSIFY,
    "/memory": Scope.MEMORY,
    "/memory/dynamic/{name:path}": Scope.MEMORY,
    "/memory/dynamic/{name:path}/{slot}": Scope.MEMORY,
    "/memory/static": Scope.MEMORY,
    "/memory/static/train": Scope.MEMORY,
    "/memory/static/{shot}": Scope.MEMORY,
    "/jobs": Scope.MEMORY,
    "/jobs/{job}": Scope.MEMORY,
    "/tenants/{tenant}": Scope.ADMIN,
    "/tenants/{tenant}/classes": Scope.ADMIN,
    "/tenants/{tenant}/classes/{name:path}": Scope.ADMIN,
    "/admin/memory/reset": Scope.ADMIN,
    "/admin/memory/snapshots": Scope.ADMIN,
    "/admin/memory/snapshots/{snapshot}": Scope.ADMIN,
    "/admin/memory/snapshots/{snapshot}/restore": Scope.ADMIN,
    "/admin/memory/export": Scope.ADMIN,
    "/admin/memory/import": Scope.ADMIN,
    "/admin/memory/migration": Scope.ADMIN,
    "/metrics": Scope.METRICS,
    "/tenants": Scope.OPERATOR,
    "/livez": None,
    "/readyz": None,
    "/version": None,
    "/problems/{slug}": None,
    "/docs": None,
}
"""By the template of its path; None where no key is needed. A route that is not here cannot be made."""

_TENANT = "dmn.tenant"
"""Where the tenant of a request's key is noted."""


class Guarded(APIRoute):
    """A route that lets in who may: with keys, whoever has one for it; otherwise everyone."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        handle, needed = super().get_route_handler(), NEEDS[self.path]
        if needed is None:
            return handle

        async def guarded(request: Request) -> Response:
            await self.admit(request)
            return await handle(request)

        return guarded

    async def admit(self, request: Request) -> None:
        """Return if whoever asks may take this route, and note for whom.

        Raises:
            Unauthenticated, Forbidden, StoreDown: as `Gate.admit` and `Caller.speak_for` do.
        """
        gate: Gate | None = request.app.state.gate
        needed = NEEDS[self.path]
        if needed is None:
            return
        if gate is None:
            _refuse_other_sites(headers_of(request.scope), request.app.state.rooms.settings.open_hosts)
        else:
            await _let_in(request, gate, needed)


def tenant_of(request: Request, header: str | None, query: str | None) -> str:
    """Return whom a request is for: the tenant that it names, or that of its key, or the default one.

    Raises:
        InvalidRequest: the name is malformed, or the two differ.
    """
    return named_tenant(header, query, request.scope.get(_TENANT, ""))


def _refuse_other_sites(headers: Mapping[str, str], known: Collection[str]) -> None:
    """Return if no web page of another site sent this: without keys, anybody's page in a browser here could.

    With keys it could not, since a browser asks before it lets a page send an `Authorization` header elsewhere. Whoever
    owns a name in the DNS can have it lead here once a page was loaded from it, and then the browser takes both for one
    site; so names that can be had there have to be `known`.

    Raises:
        Forbidden: one did, or may have.
    """
    name = _name(headers.get("host", ""))
    if "." in name and not _ADDRESS.fullmatch(name) and not name.endswith(".localhost") and name not in known:
        raise Forbidden(
            f"The call came to the name {name[:100]!r}, and without keys (DMN_AUTH=open) a web page could have had a "
            "browser send it. Use an address or localhost, or have DMN_OPEN_HOSTS name it."
        )
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    foreign = origin is not None and origin.rpartition("//")[2] != headers.get("host")
    if site == "cross-site" or (site is None and foreign):
        raise Forbidden("A web page of another site sent this call, and without keys (DMN_AUTH=open) none may.")


def _name(host: str) -> str:
    """Return the name, or address, of a `Host` header, without its port and the dot that may end it."""
    return _PORT.sub("", host.strip().lower()).rstrip(".")


_PORT = re.compile(r":[0-9]*$")
_ADDRESS = re.compile(r"[0-9.]+|\[[0-9a-f:.]+\]")


async def _let_in(request: Request, gate: Gate, scope: Scope) -> None:
    """Return if the caller may, and note for whom.

    Raises:
        Unauthenticated, Forbidden, StoreDown: as `Gate.admit` and `Caller.speak_for` do.
    """
    caller = await gate.admit(request.headers.getlist("authorization"), scope)
    # Wherever a tenant can be named, and however often: the route may look at one of them alone, or at none.
    named = [*request.headers.getlist("x-tenant"), *request.query_params.getlist("tenant")]
    if "tenant" in request.path_params:
        named.append(request.path_params["tenant"])
    caller.speak_for(named)
    request.scope[_TENANT] = caller.tenant
