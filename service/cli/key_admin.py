"""Makes API keys, shows them, and takes them back: the commands `dmn keys`.

They work on the store itself, the one that the settings name, whether a service runs on it or not: who may reach the
store may do everything anyway. A service learns of what they did within a second.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from service.access.api_keys import Scope, hash_of, id_of, new_key
from service.domain.records import StoredKey
from service.domain.tenant import tenant_name
from service.settings import Settings
from service.stores.factory import open_store
from service.stores.protocol import MemoryStore

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_OF_NO_TENANT = frozenset((Scope.OPERATOR, Scope.METRICS))
_LATEST = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


async def create(
    settings: Settings, *, tenant: str, scopes: Sequence[str], expires: float | None, now: float
) -> tuple[str, StoredKey, bool]:
    """Make a key and keep its hash; return the key, which nobody can find out later, and whether its tenant is there.

    Raises:
        ValueError: the scopes do not fit, or the store cannot be reached by a command.
        InvalidRequest: the tenant's name is malformed.
        StoreDown: the store does not answer.
    """
    _check_scopes(scopes, tenant)
    if tenant:
        tenant_name(tenant)
    async with _store(settings) as store:
        while True:
            key, id_ = new_key(tenant)
            kept = StoredKey(id=id_, digest=hash_of(key), scopes=tuple(scopes), created=now, expires=expires)
            if await store.keep_key(kept):
                return key, kept, not tenant or await store.get(tenant) is not None


async def every(settings: Settings, tenant: str | None) -> Sequence[StoredKey]:
    """Return the keys of a tenant, or all.

    Raises:
        ValueError, InvalidRequest, StoreDown: as for `create`.
    """
    if tenant is not None:
        tenant_name(tenant)
    async with _store(settings) as store:
        return await store.keys(tenant)


async def revoke(settings: Settings, which: str) -> str:
    """Take a key back, by its id or by itself, and return its id.

    Raises:
        ValueError: there is no such key, or the store cannot be reached by a command.
        StoreDown: the store does not answer.
    """
    id_ = id_of(which) or which
    async with _store(settings) as store:
        if not await store.drop_key(id_):
            raise ValueError("There is no key of this id. `dmn keys list` shows those that there are.")
    return id_


def moment(text: str, now: float) -> float:
    """Return when a key expires: so long from now (`90d`, `12h`), or at a date or time (`2030-01-31`, UTC).

    Raises:
        ValueError: it is neither, or not ahead.
    """
    span = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
    try:
        ends = now + int(span[1]) * _UNITS_S[span[2]] if span else _date(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"--expires takes a time from now, such as 90d or 12h, or a date, such as 2030-01-31; got {text!r}."
        ) from error
    if not now < ends < _LATEST:
        raise ValueError(f"--expires has to be ahead; {text!r} is not.")
    return ends


def told(key: StoredKey, now: float) -> dict[str, Any]:
    """Return what may be shown of a key, for machines."""
    return {
        "id": key.id,
        "tenant": key.tenant or None,
        "scopes": list(key.scopes),
        "created": _iso(key.created),
        "expires": None if key.expires is None else _iso(key.expires),
        "expired": key.expires is not None and key.expires <= now,
    }


def table(keys: Sequence[StoredKey], now: float) -> Table:
    """Return what may be shown of keys, for people."""
    shown = Table("id", "tenant", "scopes", "created (UTC)", "expires (UTC)", box=None, pad_edge=False)
    for column in shown.columns:
        column.overflow = "fold"  # rather than cut off what people want to copy
    for key in keys:
        over = key.expires is not None and key.expires <= now
        expires = "never" if key.expires is None else f"{_minute(key.expires)}{' (over)' if over else ''}"
        shown.add_row(key.id, key.tenant or "-", ", ".join(key.scopes), _minute(key.created), expires)
    return shown


def _check_scopes(scopes: Sequence[str], tenant: str) -> None:
    known = ", ".join(Scope)
    if not scopes or not set(scopes) <= set(Scope):
        raise ValueError(f"--scope takes some of {known}, separated by commas; got {','.join(scopes)!r}.")
    if Scope.OPERATOR in scopes and len(set(scopes)) > 1:
        raise ValueError("A key with the scope operator may do everything: name no other scope.")
    if Scope.OPERATOR in scopes and tenant:
        raise ValueError("A key with the scope operator belongs to no tenant: leave out --tenant.")
    if not tenant and not set(scopes) <= _OF_NO_TENANT:
        raise ValueError(
            "Say with --tenant whose key it is; only one for operator or for metrics belongs to no tenant."
        )


@asynccontextmanager
async def _store(settings: Settings) -> AsyncIterator[MemoryStore]:
    """Open the store; an embedded one is shared with the service that runs on it, or started for the moment.

    Raises:
        ValueError: it is in the memory of a service.
        StoreDown: it does not answer, or cannot be started.
    """
    if settings.store == "memory":
        raise ValueError(
            "DMN_STORE=memory keeps keys in the service's own memory, which no command can reach. Give the service "
            "DMN_OPERATOR_KEY, or use another store."
        )
    async with open_store(settings) as store:
        yield store


def _date(text: str) -> datetime:
    given = datetime.fromisoformat(text)
    return given if given.tzinfo else given.replace(tzinfo=UTC)


def _minute(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
