"""The gate: who calls, for which tenant, and what it may do.

Mode `open` asks for no key: the caller names its tenant, and is allowed everything. Settings refuse it on an address
that others can reach. Mode `keys` asks for one:

Authorization, scope ──admit──> Caller    401 no key, or none that is valid; 403 not for this call
Caller, names ──speak_for──> nothing      403 a tenant is named that is not the key's

A key is `dmn_<id>_<secret>`, and its id begins with the name of its tenant. Nothing here asks whether a tenant exists,
so no answer can tell.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from service.domain.tenant import tenant_name
from service.errors import Forbidden, InvalidRequest, Unauthenticated
from service.settings import DEFAULT_TENANT

from .api_keys import BEARER, SECRET_BYTES, Scope, hash_of, id_of
from .key_cache import Find, Keyring


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who calls: `tenant` is the one that its key belongs to, or ''."""

    tenant: str
    scopes: frozenset[str]

    @property
    def operates(self) -> bool:
        """Whether it may do everything."""
        return Scope.OPERATOR in self.scopes

    def speak_for(self, named: Iterable[str]) -> None:
        """Return if the caller may speak for every tenant that it names.

        Raises:
            Forbidden: it may not; there may or may not be such a tenant.
        """
        if not self.operates and any(name != self.tenant for name in named):
            raise Forbidden("The API key is not for the tenant that the call names.")


OPERATOR = Caller(tenant="", scopes=frozenset((Scope.OPERATOR,)))


def named_tenant(header: str | None, query: str | None, own: str = "") -> str:
    """Return the tenant that a caller names by `X-Tenant` or `?tenant=`, or its own, or the default one.

    Raises:
        InvalidRequest: the name is malformed, or the two differ.
    """
    if header is not None and query is not None and header != query:
        raise InvalidRequest("X-Tenant and ?tenant= name different tenants; send one of them.")
    given = header if header is not None else query
    return (own or DEFAULT_TENANT) if given is None else tenant_name(given)


class Gate:
    """Knows callers by their keys. `clock` is monotonic and `wall` is wall time, both in seconds."""

    def __init__(
        self, find: Find, *, clock: Callable[[], float], wall: Callable[[], float], operator_key: str = ""
    ) -> None:
        self._keyring, self._wall = Keyring(find, clock), wall
        # One that nobody has, where there is none: so that there is always something to compare with.
        self._operator = hash_of(operator_key or secrets.token_hex(SECRET_BYTES))
        self._nobody = hash_of(secrets.token_hex(SECRET_BYTES))

    async def admit(self, authorization: Sequence[str], scope: Scope) -> Caller:
        """Return who calls, by its `Authorization` headers, if it may do what needs a scope.

        Raises:
            Unauthenticated: there is no key, or none that is valid; which of all reasons is not said.
            Forbidden: the key does not have the scope.
            StoreDown: the key cannot be looked up now.
        """
        caller = await self._known(_presented(authorization))
        if not caller.operates and scope not in caller.scopes:
            raise Forbidden(f"The API key does not have the scope {scope.value!r} that this call needs.")
        return caller

    async def aclose(self) -> None:
        """Stop looking up keys."""
        await self._keyring.aclose()

    async def _known(self, key: str) -> Caller:
        digest = hash_of(key)
        # Digests of all keys have one length, and which digits of them agree tells nothing of the key; compared in
        # constant time all the same, so that nobody has to think about it.
        if hmac.compare_digest(digest, self._operator):
            return OPERATOR
        id_ = id_of(key)
        found = None if id_ is None else await self._keyring.find(id_)
        right = hmac.compare_digest(digest, self._nobody if found is None else found.digest)
        if found is None or not right or (found.expires is not None and found.expires <= self._wall()):
            raise Unauthenticated("The API key is not valid.")
        return Caller(tenant=found.tenant, scopes=frozenset(found.scopes))


def _presented(authorization: Sequence[str]) -> str:
    """Return the key that a call presents.

    Raises:
        Unauthenticated: it presents none, or several.
    """
    if not authorization:
        raise Unauthenticated("The call needs an API key: Authorization: Bearer KEY.")
    found = BEARER.fullmatch(authorization[0]) if len(authorization) == 1 else None
    if found is None:
        raise Unauthenticated("The Authorization header is malformed: it has to be Bearer KEY, once.")
    return found[1]
