"""The gate: who calls, for which tenant, and what it may do.

Mode `open` asks for no key: the caller names its tenant, and is allowed everything. Settings refuse it on an address
that others can reach. Mode `keys` asks for one:

Authorization, scope ──admit──> Caller    401 no key, or none that is valid; 403 not for this call
Caller, names ──speak_for──> nothing      403 a tenant is named that is not the key's

A key is `dmn_<id>_<secret>`, and its id begins with the name of its tenant. Nothing here asks whether a tenant exists,
so no answer can tell.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from itertools import islice

from service.domain.tenant import tenant_name
from service.errors import Forbidden, InvalidRequest, StoreDown, Unauthenticated
from service.settings import DEFAULT_TENANT
from service.stores.protocol import StoredKey, tenant_of_key

FRESH_S = 0.5
"""How old what is known of a key may be. A revoked one has to be refused within a second, by every process."""

_MOST_KNOWN = 10_000
_TOGETHER = 256
"""Keys that are looked up in one round trip."""

_SECRET_BYTES = 24
_NUMBER_BYTES = 6
_KEY = re.compile(r"dmn_(?P<id>(?:[A-Za-z0-9][A-Za-z0-9._-]{0,63}_)?[0-9a-f]{12})_[0-9a-f]{48}")
_BEARER = re.compile(r"(?i:bearer) +([\x21-\x7e]{1,512}) *")

Find = Callable[[Sequence[str]], Awaitable[Sequence[StoredKey | StoreDown | None]]]
"""Looks up keys by id, where they are kept; as `MemoryStore.find_keys`."""


class Scope(StrEnum):
    """What a key allows. An operator's belongs to no tenant and may do everything, for every tenant."""

    CLASSIFY = "classify"
    MEMORY = "memory"
    ADMIN = "admin"
    METRICS = "metrics"
    OPERATOR = "operator"


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


# Keys -----------------------------------------------------------------------------------------------------------------


def new_key(tenant: str) -> tuple[str, str]:
    """Return a key that nobody has yet, and its id, for a tenant or, with '', for none."""
    number = secrets.token_hex(_NUMBER_BYTES)
    id_ = f"{tenant}_{number}" if tenant else number
    return f"dmn_{id_}_{secrets.token_hex(_SECRET_BYTES)}", id_


def id_of(key: str) -> str | None:
    """Return the id of a key, or None of what is no key of ours."""
    found = _KEY.fullmatch(key)
    return None if found is None else found["id"]


def claimed_tenant(authorization: str) -> str:
    """Return whose key an `Authorization` header says that it holds, or ''. Nobody has looked whether it is one."""
    found = _BEARER.fullmatch(authorization)
    id_ = None if found is None else id_of(found[1])
    return "" if id_ is None else tenant_of_key(id_)


def hash_of(key: str) -> str:
    """Return what is kept of a key: its SHA-256.

    One round and no salt are right here. A slow hash is there to make guessing what people can remember expensive; a
    key of ours holds 192 random bits, which nobody guesses however fast, and a slow hash would only let callers keep
    the processor busy. Two keys never have the same secret, so a salt would tell nothing apart.
    """
    return sha256(key.encode()).hexdigest()


class Gate:
    """Knows callers by their keys. `clock` is monotonic and `wall` is wall time, both in seconds."""

    def __init__(
        self, find: Find, *, clock: Callable[[], float], wall: Callable[[], float], operator_key: str = ""
    ) -> None:
        self._keyring, self._wall = Keyring(find, clock), wall
        # One that nobody has, where there is none: so that there is always something to compare with.
        self._operator = hash_of(operator_key or secrets.token_hex(_SECRET_BYTES))
        self._nobody = hash_of(secrets.token_hex(_SECRET_BYTES))

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


class Keyring:
    """What is kept of keys, as it was not long ago, also that there is no such key.

    Keys that are asked for at the same time are looked up together, one round trip after the other: however many
    wrong ones come in, the store is asked one thing at a time.
    """

    def __init__(self, find: Find, clock: Callable[[], float]) -> None:
        self._find, self._clock = find, clock
        self._known: OrderedDict[str, tuple[float, StoredKey | None]] = OrderedDict()
        self._asked: dict[str, asyncio.Future[StoredKey | None]] = {}
        self._asking: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._known)

    async def find(self, id_: str) -> StoredKey | None:
        """Return what is kept of a key, or None; as it was `FRESH_S` ago or later.

        Raises:
            StoreDown: it cannot be looked up.
        """
        read_at, known = self._known.get(id_, (None, None))
        if read_at is not None and self._clock() - read_at <= FRESH_S:
            return known
        # Not one that is being looked up already: what is read of it may be older than this call.
        future = self._asked.setdefault(id_, asyncio.get_running_loop().create_future())
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name="dmn-keys")
        return await asyncio.shield(future)

    async def aclose(self) -> None:
        """Look up nothing any more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def _ask(self) -> None:
        try:
            while self._asked:
                ids = list(islice(self._asked, _TOGETHER))
                await self._answer({id_: self._asked.pop(id_) for id_ in ids})
        finally:
            self._asking = None
            for future in self._asked.values():
                future.cancel()

    async def _answer(self, asked: dict[str, asyncio.Future[StoredKey | None]]) -> None:
        read_at = self._clock()
        try:
            found = await self._find(list(asked))
        except asyncio.CancelledError:
            for future in asked.values():
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            found = [error] * len(asked)  # type: ignore[list-item]
        for (id_, future), one in zip(asked.items(), found, strict=True):
            if isinstance(one, Exception):
                future.set_exception(one)
                future.exception()  # heard of, even where nobody waits any more
            else:
                future.set_result(one)
                self._note(id_, read_at, one)

    def _note(self, id_: str, read_at: float, found: StoredKey | None) -> None:
        self._known.pop(id_, None)
        self._known[id_] = read_at, found
        while len(self._known) > _MOST_KNOWN or read_at - next(iter(self._known.values()))[0] > FRESH_S:
            self._known.popitem(last=False)


def _presented(authorization: Sequence[str]) -> str:
    """Return the key that a call presents.

    Raises:
        Unauthenticated: it presents none, or several.
    """
    if not authorization:
        raise Unauthenticated("The call needs an API key: Authorization: Bearer KEY.")
    found = _BEARER.fullmatch(authorization[0]) if len(authorization) == 1 else None
    if found is None:
        raise Unauthenticated("The Authorization header is malformed: it has to be Bearer KEY, once.")
    return found[1]
