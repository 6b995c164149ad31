"""The gate: who calls, and for which tenant.

Mode `open` asks for no key: the caller names its tenant, and is allowed everything. Settings refuse it on an address
that others can reach.
"""

from __future__ import annotations

from .errors import InvalidRequest
from .settings import DEFAULT_TENANT
from .tenants import tenant_name


def named_tenant(header: str | None, query: str | None) -> str:
    """Return the tenant that a caller names by `X-Tenant` or `?tenant=`, or the default one.

    Raises:
        InvalidRequest: the name is malformed, or the two differ.
    """
    if header is not None and query is not None and header != query:
        raise InvalidRequest("X-Tenant and ?tenant= name different tenants; send one of them.")
    given = header if header is not None else query
    return DEFAULT_TENANT if given is None else tenant_name(given)
