"""Connections to Redis or Valkey: how a URL becomes a client, whether the server is fit, and what its errors mean.

URL ──connect──> client     ValueError: what is wrong with the URL, and one that is right
client ──check──> nothing   StoreDown: why the server cannot keep memories, and what to do
error ──down──> StoreDown   what went wrong during a call, without an address or a password
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from redis import exceptions as told
from redis.asyncio import (
    BlockingConnectionPool,
    Connection,
    ConnectionPool,
    Redis,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection
from redis.backoff import ExponentialBackoff, NoBackoff

from .client import Single
from .cluster import Cluster
from .url import Address, Place, parse

TIMEOUT_S = 5.0
"""How long a server may take to answer, unless the caller says otherwise."""

_CONNECTIONS = 64
"""Connections to one server; callers beyond that wait for one to come free."""

_PROTOCOL = 2
"""Of RESP. The third would add a command to each connection that servers older than 6 and narrow ACLs refuse."""


def connect(url: str, *, timeout_s: float = TIMEOUT_S) -> Redis:
    """Return a client for a store's URL; it connects when it is first used.

    The schemes are `redis`, `rediss`, `unix`, and `redis` or `rediss` with `+sentinel` or `+cluster`. User and password
    are percent-encoded. Connecting takes `timeout_s` at most, and so does each answer. A connection that breaks is
    tried again twice within a tenth of a second: every call of ours may be repeated. A command ends after twice
    `timeout_s`, with all that it took: waiting for a connection, other Sentinels, other nodes of a cluster.

    Raises:
        ValueError: the URL is malformed; says what is wrong, and never the password.
    """
    place = parse(url)
    if place.kind == "cluster":
        return _cluster(place, timeout_s)
    pool = _sentinel_pool(place, timeout_s) if place.kind == "sentinel" else _pool(place, timeout_s, _retry())
    return Single(pool, shown=place.shown, patience_s=2 * timeout_s)


# From place to client -------------------------------------------------------------------------------------------------


class _Sentinels(Sentinel):
    """Sentinels, the one that answered last first.

    redis-py reorders them in place, and two callers at once put one twice and another one out.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self._all = tuple(self.sentinels)

    async def discover_master(self, service_name: str) -> Address:
        try:
            return tuple(await super().discover_master(service_name))
        finally:
            self.sentinels = list(dict.fromkeys((*self.sentinels, *self._all)))


class _SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the server that Sentinels name; callers beyond their number wait."""


class _Heeding(AbstractConnection):
    """A connection that gives up when its caller is cancelled while it sends.

    redis-py sends within `asyncio.wait_for`, which in Python 3.11 forgets a cancellation if what it waits for is done,
    as sending mostly is, or has failed: deadlines would pass unheard, and loops that are told to stop go on.
    """

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 - as in the base
        task = asyncio.current_task()
        before = task.cancelling() if task else 0
        try:
            await super().send_packed_command(command, check_health)
        finally:
            if task and task.cancelling() > before:
                await self.disconnect(nowait=True)
                raise asyncio.CancelledError


class _Plain(_Heeding, Connection):
    """One over TCP."""


class _Secure(_Heeding, SSLConnection):
    """One over TLS."""


class LocalConnection(_Heeding, UnixDomainSocketConnection):
    """One through a socket of this machine."""


class _Watched(_Heeding, SentinelManagedConnection):
    """A connection that asks the Sentinels again before it is made anew, and not only when the pool makes it.

    Without it a call that meets a primary which was just demoted tries that one again, until it gives up.
    """

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 - as in the base
        if not self.is_connected:
            await self.connect()  # type: ignore[no-untyped-call]
        await super().send_packed_command(command, check_health)


class _WatchedSecure(_Watched, SSLConnection):
    """The same over TLS."""


def _pool(place: Place, timeout_s: float, retry: Retry) -> ConnectionPool:
    """Return connections to one server."""
    common = _common(timeout_s) | place.login() | {"db": place.db, "retry": retry}
    if place.kind == "unix":
        own: dict[str, Any] = {"connection_class": LocalConnection, "path": place.name}
    else:
        ((host, port),) = place.hosts
        kind = _Secure if place.tls else _Plain
        own = {"connection_class": kind, "host": host, "port": port, "socket_keepalive": True} | place.security()
    return BlockingConnectionPool(max_connections=_CONNECTIONS, timeout=timeout_s, **common, **own)


def _sentinel_pool(place: Place, timeout_s: float) -> ConnectionPool:
    """Return connections to the server that Sentinels name."""
    # All of them together have the time of one answer: one that is dead must not use it up for the others.
    watchers = _common(timeout_s / len(place.hosts)) | {"retry": Retry(NoBackoff(), 0), "socket_keepalive": True}
    if place.tls:
        watchers |= {"ssl": True} | place.security()
    for name in ("username", "password"):
        watchers[name] = place.options.get(f"sentinel_{name}")
    sentinels = _Sentinels(place.hosts, sentinel_kwargs=watchers)
    own = {"db": place.db, "retry": _retry(), "socket_keepalive": True} | place.login() | place.security()
    return _SentinelPool(  # type: ignore[no-untyped-call]
        place.name,
        sentinels,
        connection_class=_WatchedSecure if place.tls else _Watched,
        max_connections=_CONNECTIONS,
        timeout=timeout_s,
        **_common(timeout_s),
        **own,
    )


def _cluster(place: Place, timeout_s: float) -> Cluster:
    def node(address: Address) -> Single:
        alone = replace(place, kind="single", hosts=(address,))
        # No second try of its own: the cluster's client looks first whether the slot has another owner by now.
        return Single(_pool(alone, timeout_s, Retry(NoBackoff(), 0)), shown=alone.shown, patience_s=2 * timeout_s)

    return Cluster(place.hosts, node, shown=place.shown, patience_s=2 * timeout_s)


def _common(timeout_s: float) -> dict[str, Any]:
    return {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "protocol": _PROTOCOL}


def _retry() -> Retry:
    """Return what tries a broken connection again; one that was silent for the whole timeout has had its time."""
    return Retry(ExponentialBackoff(cap=0.1, base=0.01), 2, supported_errors=(told.ConnectionError,))
