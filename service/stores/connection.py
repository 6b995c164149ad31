"""Connections to Redis or Valkey: how a URL becomes a client, whether the server is fit, and what its errors mean.

URL ──connect──> client     ValueError: what is wrong with the URL, and one that is right
client ──check──> nothing   StoreDown: why the server cannot keep memories, and what to do
error ──down──> StoreDown   what went wrong during a call, without an address or a password
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from errno import EADDRNOTAVAIL, ECONNREFUSED, EHOSTUNREACH, ENETUNREACH
from functools import partial
from hashlib import sha1
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from redis import exceptions as told
from redis.asyncio import (
    BlockingConnectionPool,
    Connection,
    ConnectionPool,
    Redis,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from ..errors import StoreDown

FAULTS = (told.RedisError, OSError)
"""Everything that a client raises when the server, or the way to it, is at fault: what `down` explains."""

OLDEST = (6, 2)
"""Version that the scripts need."""

TIMEOUT_S = 5.0
"""How long a server may take to answer, unless the caller says otherwise."""

LOADING_S = 15.0
"""How long `check` waits for a server that has just been started and reads its data."""

_CONNECTIONS = 64
"""Connections to one server; callers beyond that wait for one to come free."""

_PROTOCOL = 2
"""Of RESP. The third would add a command to each connection that servers older than 6 and narrow ACLs refuse."""

_LOADING_PAUSE_S = 0.1
_SOON_S, _LATER_S = 1.0, 10.0

Kind = Literal["single", "unix", "sentinel", "cluster"]
Address = tuple[str, int]
Command = tuple[Sequence[Any], Mapping[str, Any]]

_SCHEMES: Mapping[str, tuple[Kind, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_EXAMPLES: Mapping[Kind, str] = {
    "single": "redis://user:password@host:6379/0",
    "unix": "unix:///run/valkey.sock?db=0",
    "sentinel": "redis+sentinel://user:password@host1:26379,host2:26379/service/0",
    "cluster": "redis+cluster://user:password@host1:6379,host2:6379",
}
_PORTS: Mapping[Kind, int] = {"single": 6379, "unix": 0, "sentinel": 26379, "cluster": 6379}

_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS_OPTIONS = (*_TLS_FILES, "ssl_cert_reqs", "ssl_check_hostname")
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")


def connect(url: str, *, timeout_s: float = TIMEOUT_S) -> Redis:
    """Return a client for a store's URL; it connects when it is first used.

    The schemes are `redis`, `rediss`, `unix`, and `redis` or `rediss` with `+sentinel` or `+cluster`. User and password
    are percent-encoded. Connecting takes `timeout_s` at most, and so does each answer. A connection that breaks is
    tried again twice within a tenth of a second: every call of ours may be repeated. A command ends after twice
    `timeout_s`, with all that it took: waiting for a connection, other Sentinels, other nodes of a cluster.

    Raises:
        ValueError: the URL is malformed; says what is wrong, and never the password.
    """
    place = _parse(url)
    if place.kind == "cluster":
        return _cluster(place, timeout_s)
    pool = _sentinel_pool(place, timeout_s) if place.kind == "sentinel" else _pool(place, timeout_s, _retry())
    return _Single(pool, shown=place.shown, patience_s=2 * timeout_s)


async def check(client: Redis, *, loading_s: float = LOADING_S) -> None:
    """Return if the server, and every node of a cluster, is fit to keep memories.

    Raises:
        StoreDown: it is not; one line that names the server and says why.
    """
    shown = getattr(client, "shown", "")
    try:
        nodes = await _loaded(client, loading_s)
        for where, about in nodes.items():
            _fit(f"The store {where}".strip(), about, cluster=isinstance(client, _Cluster))
        await _try_scripts(client)
    except FAULTS as error:
        raise down(error, shown) from error


def down(error: BaseException, shown: str = "") -> StoreDown:
    """Return what a client's error means and when to come back; `shown` says where the store is, if that may be said.

    The server's own words are not repeated: they may hold names, keys or arguments.
    """
    wait_s, says = _meaning(list(_causes(error)))
    return StoreDown(f"{f'The store {shown}'.strip()} {says}.", retry_after_s=wait_s)


# From URL to place ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a store is, and how it is entered; `name` is the socket's path or the Sentinels' name for the primary."""

    kind: Kind
    tls: bool
    hosts: tuple[Address, ...]
    name: str
    db: int
    username: str | None
    password: str | None = field(repr=False)
    options: Mapping[str, str] = field(repr=False)

    @property
    def shown(self) -> str:
        """Where it is, for people; without the password."""
        if self.kind == "unix":
            return f"at {self.name}"
        hosts = ", ".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{self.name!r} of the Sentinels at {hosts}" if self.kind == "sentinel" else f"at {hosts}"

    def login(self) -> dict[str, Any]:
        return {"username": self.username, "password": self.password}

    def security(self) -> dict[str, Any]:
        """Return what redis-py wants to know for TLS."""
        given: dict[str, Any] = {name: value for name, value in self.options.items() if name in _TLS_OPTIONS}
        if "ssl_check_hostname" in given:
            given["ssl_check_hostname"] = given["ssl_check_hostname"] == "true"
        return given


def _parse(url: str) -> _Place:
    """Return what a URL says. By hand: the standard library knows neither several hosts nor raw `[` in a password.

    Raises:
        ValueError: as for `connect`. What the user wrote is not repeated: a password may stand anywhere by mistake.
    """
    scheme, colon, rest = url.partition("://")
    if not colon or scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ValueError(f"The store URL must begin with one of {known} (such as {_EXAMPLES['single']}).")
    kind, tls = _SCHEMES[scheme]
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    _refuse_raw_letters(kind, rest, authority, path, query)
    user, _, hosts = authority.rpartition("@")
    username, _, password = user.partition(":")
    options = _options(kind, query, tls=tls)
    name, db = _inside(kind, path, options.get("db"))
    return _Place(
        kind=kind,
        tls=tls,
        hosts=_hosts(kind, hosts),
        name=name,
        db=db,
        username=unquote(username) or None,
        password=unquote(password) or None,
        options=options,
    )


def _refuse_raw_letters(kind: Kind, rest: str, authority: str, path: str, query: str) -> None:
    """Raise for a password that was not encoded and so ends before it should."""
    if any(letter.isspace() or not letter.isprintable() for letter in rest):
        raise _wrong(kind, "holds a space or a control character")
    if "#" in rest or "@" in path or ("@" in query and "@" not in authority):
        raise _wrong(kind, "holds one of / ? # @ where it cannot be; in user and password write %2F %3F %23 %40")


def _hosts(kind: Kind, text: str) -> tuple[Address, ...]:
    if kind == "unix":
        if text:
            raise _wrong(kind, "names a host, or a path that does not begin with /")
        return ()
    hosts = tuple(_host(kind, part) for part in text.split(","))
    if kind == "single" and len(hosts) > 1:
        raise _wrong(kind, "has several hosts, which only +sentinel:// and +cluster:// take")
    return hosts


def _host(kind: Kind, text: str) -> Address:
    found = re.fullmatch(r"(?:\[(?P<v6>[^\[\]]*)\]|(?P<name>[^:\[\]]*))(?::(?P<port>[^:]*))?", text)
    if found is None:
        raise _wrong(kind, "has a host that cannot be read; an IPv6 address stands in brackets, as in [::1]:6379")
    if found["name"] == "":
        raise _wrong(kind, "has no host")
    port = str(_PORTS[kind]) if found["port"] is None else found["port"]
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise _wrong(kind, "has a port that is no number from 1 to 65535")
    if found["v6"] is not None:
        return _v6(kind, found["v6"]), int(port)
    return found["name"], int(port)


def _v6(kind: Kind, text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(unquote(text)))
    except ValueError:
        raise _wrong(kind, "has something else than an IPv6 address in brackets") from None


def _options(kind: Kind, query: str, *, tls: bool) -> dict[str, str]:
    pairs = (part.partition("=") for part in query.split("&") if part)
    given = {unquote(name): unquote(value) for name, _, value in pairs}
    known = (
        *(("db",) if kind in ("single", "unix") else ()),
        *(_TLS_OPTIONS if tls else ()),
        *(_SENTINEL_OPTIONS if kind == "sentinel" else ()),
    )
    if unknown := sorted(name for name in given if name not in known):
        listed = f"it knows {', '.join(known)}" if known else "it knows none"
        named = next((name for name in unknown if re.fullmatch(r"[a-z_]{1,30}", name)), None)
        raise _wrong(kind, f"has an option that is not known{f' ({named})' if named else ''}; {listed}")
    for name in _TLS_FILES:
        if name in given and not Path(given[name]).is_file():
            raise _wrong(kind, f"gives a file by {name} that is not there")
    if given.get("ssl_check_hostname", "true") not in ("true", "false"):
        raise _wrong(kind, "has an ssl_check_hostname that is neither true nor false")
    if given.get("ssl_cert_reqs", "required") not in ("none", "optional", "required"):
        raise _wrong(kind, "has an ssl_cert_reqs that is none of none, optional and required")
    return given


def _inside(kind: Kind, path: str, option: str | None) -> tuple[str, int]:
    """Return the name and the database that the path gives, or an option of the URL."""
    if kind == "unix":
        if not path:
            raise _wrong(kind, "has no path of a socket")
        return f"/{unquote(path)}", _db(kind, option or "0")
    if kind == "sentinel":
        name, _, number = path.rstrip("/").partition("/")
        if not name:
            raise _wrong(kind, "has no name of the service that the Sentinels watch")
        return unquote(name), _db(kind, number or "0")
    db = _db(kind, path.strip("/") or option or "0")
    if kind == "cluster" and db:
        raise _wrong(kind, "names a database, and a cluster has only one")
    return "", db


def _db(kind: Kind, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise _wrong(kind, "has a database that is no number")
    return int(text)


def _wrong(kind: Kind, fault: str) -> ValueError:
    return ValueError(f"The store URL {fault}. One that is right: {_EXAMPLES[kind]}.")


# From place to client -------------------------------------------------------------------------------------------------


class _Single(Redis):
    """A client of one server, or of the one that Sentinels name."""

    def __init__(self, pool: ConnectionPool, *, shown: str, patience_s: float) -> None:
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self.shown, self.patience_s = shown, patience_s

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        async with asyncio.timeout(self.patience_s):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:  # noqa: ARG002, FBT001, FBT002 - as in the base
        return _Batch(self, transaction=transaction)

    async def asking(self, *args: Any, **options: Any) -> Any:
        """Run a command for a slot that is on its way to this node of a cluster: what allows it goes just before it."""
        batch = self.pipeline(transaction=False)
        batch.execute_command("ASKING")
        batch.execute_command(*args, **options)
        return (await batch.execute())[1]

    async def aclose(self, close_connection_pool: bool | None = None) -> None:  # noqa: FBT001 - as in the base
        """Close every connection, also those to Sentinels."""
        await super().aclose(close_connection_pool)
        for sentinel in getattr(getattr(self.connection_pool, "sentinel_manager", None), "sentinels", ()):
            await sentinel.aclose()


class _Batch(Pipeline):
    """Commands for one server that go together."""

    def __init__(self, client: _Single, *, transaction: bool) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, transaction, None)
        self._patience_s = client.patience_s

    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002 - as in the base
        async with asyncio.timeout(self._patience_s):
            return await super().execute(raise_on_error)


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


class _Watched(SentinelManagedConnection):
    """A connection that asks the Sentinels again before it is made anew, and not only when the pool makes it.

    Without it a call that meets a primary which was just demoted tries that one again, until it gives up.
    """

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 - as in the base
        if not self.is_connected:
            await self.connect()  # type: ignore[no-untyped-call]
        await super().send_packed_command(command, check_health)


class _WatchedSecure(_Watched, SSLConnection):
    """The same over TLS."""


def _pool(place: _Place, timeout_s: float, retry: Retry) -> ConnectionPool:
    """Return connections to one server."""
    common = _common(timeout_s) | place.login() | {"db": place.db, "retry": retry}
    if place.kind == "unix":
        own: dict[str, Any] = {"connection_class": UnixDomainSocketConnection, "path": place.name}
    else:
        ((host, port),) = place.hosts
        kind = SSLConnection if place.tls else Connection
        own = {"connection_class": kind, "host": host, "port": port, "socket_keepalive": True} | place.security()
    return BlockingConnectionPool(max_connections=_CONNECTIONS, timeout=timeout_s, **common, **own)


def _sentinel_pool(place: _Place, timeout_s: float) -> ConnectionPool:
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


def _cluster(place: _Place, timeout_s: float) -> _Cluster:
    def node(address: Address) -> _Single:
        alone = replace(place, kind="single", hosts=(address,))
        # No second try of its own: the cluster's client looks first whether the slot has another owner by now.
        return _Single(_pool(alone, timeout_s, Retry(NoBackoff(), 0)), shown=alone.shown, patience_s=2 * timeout_s)

    return _Cluster(place.hosts, node, shown=place.shown, patience_s=2 * timeout_s)


def _common(timeout_s: float) -> dict[str, Any]:
    return {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "protocol": _PROTOCOL}


def _retry() -> Retry:
    """Return what tries a broken connection again; one that was silent for the whole timeout has had its time."""
    return Retry(ExponentialBackoff(cap=0.1, base=0.01), 2, supported_errors=(told.ConnectionError,))


# A cluster ------------------------------------------------------------------------------------------------------------

_LATE = (told.TimeoutError, TimeoutError)
_AWAY = (*_LATE, told.ConnectionError, told.ClusterDownError, OSError)
"""What a node that is gone, or about to be replaced, gives instead of an answer."""

_ELSEWHERE = (told.AskError, told.TryAgainError, told.ClusterDownError, told.ConnectionError)
"""What stands for an answer where a command of many has to be sent alone, to be redirected and tried again."""

_TURNS = 16
"""Redirections of one command, and questions whether a slot is whole by now."""

_PAUSES_S = (0.02, 0.04)
_HASTE_S = 0.1
_KEYLESS = ("PING", "INFO", "CONFIG", "SCRIPT", "FLUSHALL", "FLUSHDB", "DBSIZE")


class _Cluster(Redis):
    """A client of a cluster: each command goes to the node that has its key, those without a key to all primaries.

    redis-py's own (8.1, asyncio) is not used. When one caller meets a change it closes the connections of all, which
    ends in other callers' AttributeErrors and in more changes to meet; it sends ASKING and what is asked by two
    connections, and does not find a node that has no slots yet. Here every node has an ordinary client, who owns a slot
    is corrected by each redirection, and the nodes are asked anew only when one does not answer.
    """

    def __init__(
        self, seeds: Sequence[Address], make: Callable[[Address], _Single], *, shown: str, patience_s: float
    ) -> None:
        self._seeds, self._make = tuple(seeds), make
        self._clients: dict[Address, _Single] = {}
        self._owners: list[Address | None] = []
        self._replicas: frozenset[Address] = frozenset()
        self._silent: set[Address] = set()
        self._looking, self._looks = asyncio.Lock(), 0
        self.shown, self._patience_s = shown, patience_s
        super().__init__(connection_pool=self._client(self._seeds[0]).connection_pool)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run one command.

        Raises:
            ClusterError: its slot is being moved and was not whole in time.
        """
        key = self._key(args)
        send = partial(self._to_all, args, options) if key is None else partial(self._to_owner, key, args, options)
        async with asyncio.timeout(self._patience_s):
            return await self._again(send)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:  # noqa: ARG002, FBT001, FBT002 - as in the base
        """Return a pipeline; what it holds for one node goes together, and nothing of it is a transaction."""
        return _Spread(self)

    async def run_all(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands, those of one node together, and return their answers in order, or the errors in their places.

        What a node that is away was to answer is an error; the others' answers are there all the same.
        """
        async with asyncio.timeout(self._patience_s):
            answers = await self._by_node(commands)
            astray = [at for at, answer in enumerate(answers) if isinstance(answer, _ELSEWHERE)]
            again = (self.execute_command(*commands[at][0], **commands[at][1]) for at in astray)
            for at, answer in zip(astray, await asyncio.gather(*again, return_exceptions=True), strict=True):
                answers[at] = answer
            return answers

    async def nodes(self) -> tuple[list[_Single], list[_Single]]:
        """Return the clients of all primaries and of all replicas, as the cluster is now.

        Raises:
            ClusterDownError: some slots have no primary.
        """
        await self._look(self._looks)
        if None in self._owners:
            raise _uncovered()
        primaries = dict.fromkeys(owner for owner in self._owners if owner is not None)
        return [self._client(one) for one in primaries], [self._client(one) for one in self._replicas]

    def owner_of(self, key: str) -> _Single | None:
        """Return the client of the node that is known to have a key's slot."""
        owner = self._owners[key_slot(key.encode())] if self._owners else None
        return None if owner is None else self._client(owner)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:  # noqa: ARG002, FBT001 - as in the base
        """Close every connection to every node."""
        await asyncio.gather(*(client.aclose() for client in self._clients.values()))

    def _key(self, args: Sequence[Any]) -> bytes | None:
        """Return the key that says where a command belongs; each one that the store uses has it at the same place."""
        name = str(args[0]).split()[0].upper()
        if name in _KEYLESS or (name in ("EVAL", "EVALSHA") and int(args[2]) == 0):
            return None
        key = args[3 if name in ("EVAL", "EVALSHA") else 1]
        return key if isinstance(key, bytes) else str(key).encode()

    async def _again(self, send: Callable[[], Awaitable[Any]]) -> Any:
        """Send something, and twice more if a node is away, after a look who has its slots by now.

        One that was silent is not tried again: it has had its time.
        """
        for pause_s in _PAUSES_S:
            seen = self._looks
            try:
                return await send()
            except _LATE:
                await self._try_look(seen)
                raise
            except _AWAY:
                await asyncio.sleep(pause_s)
                await self._try_look(seen)
        return await send()

    async def _to_all(self, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        await self._look(0)
        primaries = dict.fromkeys(owner for owner in self._owners if owner is not None)
        clients = [self._client(one) for one in primaries]
        return (await asyncio.gather(*(client.execute_command(*args, **options) for client in clients)))[0]

    async def _to_owner(self, key: bytes, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        slot, importing = key_slot(key), None
        for turn in range(_TURNS):
            owner, seen = await self._owner(slot), self._looks
            try:
                answer = await self._run(importing or owner, importing is not None, args, options)
            except told.MovedError as moved:
                self._owners[slot], importing = (moved.host or owner[0], moved.port), None
            except told.AskError as ask:
                importing = (ask.host or owner[0], ask.port)
            except told.TryAgainError:
                # Keys of the slot are on both nodes. Ask its owner again, after they had some time.
                importing = None
                await asyncio.sleep(min(0.1, 0.005 * 2**turn))
            except _LATE:
                await self._try_look(seen)
                if self._owners[slot] in (owner, None):
                    raise
                importing = None
            else:
                return answer
        raise told.ClusterError(f"slot {slot} was not whole in time")

    async def _run(self, address: Address, asking: bool, args: Sequence[Any], options: Mapping[str, Any]) -> Any:  # noqa: FBT001 - says which of two calls it is
        client = self._client(address)
        try:
            answer = await (client.asking if asking else client.execute_command)(*args, **options)
        except (*_LATE, told.ConnectionError, OSError):
            self._silent.add(address)
            raise
        self._silent.discard(address)
        return answer

    async def _by_node(self, commands: Sequence[Command]) -> list[Any]:
        """Return each command's answer, or the error that stands for it."""
        answers: list[Any] = [told.ConnectionError("not sent")] * len(commands)
        parts: dict[Address, list[int]] = {}
        for at, (args, _) in enumerate(commands):
            key = self._key(args)
            with suppress(told.ClusterDownError):
                if key is not None:
                    parts.setdefault(await self._owner(key_slot(key)), []).append(at)
        seen = self._looks

        async def run(address: Address, part: Sequence[int]) -> None:
            batch = self._client(address).pipeline(transaction=False)
            for at in part:
                batch.execute_command(*commands[at][0], **commands[at][1])
            try:
                replies = await batch.execute(raise_on_error=False)
            except _AWAY as error:
                self._silent.add(address)
                await self._try_look(seen)
                silent = isinstance(error, _LATE) and address in self._owners
                replies = [error if silent else told.ConnectionError("not there")] * len(part)
            for at, answer in zip(part, replies, strict=True):
                answers[at] = answer

        await asyncio.gather(*(run(address, part) for address, part in parts.items()))
        return answers

    def _client(self, address: Address) -> _Single:
        if address not in self._clients:
            self._clients[address] = self._make(address)
        return self._clients[address]

    async def _owner(self, slot: int) -> Address:
        await self._look(0)
        if self._owners[slot] in self._silent:
            await self._try_look(self._looks)
        owner = self._owners[slot]
        if owner is None:
            raise _uncovered()
        return owner

    async def _try_look(self, seen: int) -> None:
        with suppress(*_AWAY):
            await self._look(seen)

    async def _look(self, seen: int) -> None:
        """Find out who owns which slot, unless somebody has since the count of looks that the caller saw."""
        if self._looks > seen:
            return
        async with self._looking:
            if self._looks <= seen:
                self._owners, self._replicas = await self._slots()
                self._looks += 1

    async def _slots(self) -> tuple[list[Address | None], frozenset[Address]]:
        """Ask one node after the other, those last that were silent before, and return the owners and all replicas.

        A node that takes its time is not waited for before the next one is asked.
        """
        known = dict.fromkeys((*(owner for owner in self._owners if owner), *self._replicas, *self._seeds))
        waiting = sorted(known, key=self._silent.__contains__)
        asked: set[asyncio.Task[tuple[list[Address | None], frozenset[Address]]]] = set()
        fault: BaseException | None = None
        try:
            while waiting or asked:
                if waiting:
                    asked.add(asyncio.create_task(self._slots_by(waiting.pop(0))))
                patience_s = _HASTE_S if waiting else None
                done, asked = await asyncio.wait(asked, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    fault = one.exception()
                    if fault is None:
                        return one.result()
        finally:
            for one in asked:
                one.add_done_callback(lambda late: late.cancelled() or late.exception())
                one.cancel()
        raise fault or told.ConnectionError("nobody to ask")

    async def _slots_by(self, address: Address) -> tuple[list[Address | None], frozenset[Address]]:
        try:
            spans = await self._client(address).execute_command("CLUSTER", "SLOTS")
        except BaseException:
            self._silent.add(address)
            raise
        self._silent.discard(address)
        return _read_slots(spans, address)


class _Spread(Pipeline):
    """Commands for several nodes of a cluster."""

    def __init__(self, client: _Cluster) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, False, None)  # noqa: FBT003 - as in the base
        self._client = client

    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002 - as in the base
        commands, self.command_stack = self.command_stack, []
        answers = await self._client.run_all(commands)
        if raise_on_error and (faults := [answer for answer in answers if isinstance(answer, Exception)]):
            raise faults[0]
        return answers


def _read_slots(spans: Sequence[Any], asked: Address) -> tuple[list[Address | None], frozenset[Address]]:
    """Return the owner of each slot and all replicas; a node that does not know its own name is who was asked."""
    owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    replicas: set[Address] = set()
    for first, last, *nodes in spans:
        primary, *others = ((host.decode() if host else asked[0], int(port)) for host, port, *_ in nodes)
        owners[first : last + 1] = [primary] * (last + 1 - first)
        replicas.update(others)
    return owners, frozenset(replicas)


def _uncovered() -> told.ClusterDownError:
    return told.ClusterDownError("slots are not covered")


# Whether a server is fit ----------------------------------------------------------------------------------------------

_PROBE = """
redis.call('SET', KEYS[1], redis.sha1hex(struct.pack('>d', 0.5)), 'PX', 1000)
local kept = redis.call('GET', KEYS[1])
redis.call('UNLINK', KEYS[1])
return kept
"""
"""Uses what the scripts of the store use: it writes, packs and hashes. Its key would go by itself after a second."""


async def _loaded(client: Redis, seconds: float) -> dict[str, dict[str, Any]]:
    """Return what each node says of itself, by where it is, once none is reading its data any more.

    Raises:
        BusyLoadingError: one still does after so many seconds.
    """
    loop = asyncio.get_running_loop()
    ends = loop.time() + seconds
    while True:
        try:
            nodes = await (_ask_all(client) if isinstance(client, _Cluster) else _ask_one(client))
            if any(about.get("loading") == 1 for about in nodes.values()):
                raise told.BusyLoadingError
        except FAULTS as error:
            loads = any(isinstance(one, told.BusyLoadingError) for one in _causes(error))
            if not loads or loop.time() >= ends:
                raise
        else:
            return nodes
        await asyncio.sleep(_LOADING_PAUSE_S)


async def _ask_one(client: Redis) -> dict[str, dict[str, Any]]:
    return {getattr(client, "shown", ""): await client.info()}


async def _ask_all(client: _Cluster) -> dict[str, dict[str, Any]]:
    """Ask every node; a replica that is away does not keep a cluster from its work."""
    primaries, replicas = await client.nodes()
    answers = await asyncio.gather(*(node.info() for node in (*primaries, *replicas)), return_exceptions=True)
    out: dict[str, dict[str, Any]] = {}
    for node, about in zip((*primaries, *replicas), answers, strict=True):
        if not isinstance(about, BaseException):
            out[node.shown] = about
        elif not isinstance(about, FAULTS):
            raise about
        elif node not in replicas or not isinstance(about, _AWAY):
            raise down(about, node.shown) from about
    return out


def _fit(store: str, about: Mapping[str, Any], *, cluster: bool) -> None:
    """Return if a server says of itself what we need.

    Raises:
        StoreDown: it does not.
    """
    if "sentinel" in (about.get("redis_mode"), about.get("server_mode")):
        raise StoreDown(f"{store} is a Sentinel and keeps nothing: use redis+sentinel://, with the service's name.")
    version = str(about.get("redis_version", "unknown"))
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise StoreDown(f"{store} is version {version}; {OLDEST[0]}.{OLDEST[1]} or newer is needed.")
    if about.get("cluster_enabled") == 1 and not cluster:
        raise StoreDown(f"{store} is a node of a cluster: use redis+cluster:// (or rediss+cluster://).")
    if about.get("role") != "master" and not cluster:
        raise StoreDown(f"{store} is a read-only replica: name its primary, or use redis+sentinel://.")
    policy = about.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StoreDown(
            f"{store} has the maxmemory-policy {policy}: it would drop memories without a word. Set it to noeviction."
        )


async def _try_scripts(client: Redis) -> None:
    """Run a script that writes, on every primary, in both ways that the store uses."""
    digest = sha1(_PROBE.encode(), usedforsecurity=False).hexdigest()
    for key in await _probes(client):
        for command, script in (("EVAL", _PROBE), ("EVALSHA", digest)):
            await client.execute_command(command, script, 1, key)  # type: ignore[no-untyped-call]


async def _probes(client: Redis) -> Sequence[str]:
    """Return keys to write to for a moment, one on each primary; no tenant's key looks like them."""
    named = map("dmn:check:{{{}}}".format, range(REDIS_CLUSTER_HASH_SLOTS))
    if not isinstance(client, _Cluster):
        return [next(named)]
    primaries, _ = await client.nodes()
    keys: dict[_Single | None, str] = {}
    while len(keys) < len(primaries) and (key := next(named, None)) is not None:
        keys.setdefault(client.owner_of(key), key)
    return list(keys.values())


# What errors mean -----------------------------------------------------------------------------------------------------


_MEANINGS: tuple[tuple[str, float, str], ...] = (
    (
        r"^MasterNotFoundError.*AuthenticationError",
        _LATER_S,
        "cannot be found: its Sentinels refuse the user or the password that the URL gives by ?sentinel_password=",
    ),
    (
        r"^MasterNotFoundError.* : ",
        _SOON_S,
        "cannot be found: no Sentinel that answers knows it, and some do not answer",
    ),
    (r"^MasterNotFoundError", _SOON_S, "cannot be found: its Sentinels know no primary of this name that is up"),
    (r"without any password|no password is set", _LATER_S, "has no password, but the URL gives one"),
    (r"(?i)authentication required", _LATER_S, "asks for a password, and the URL gives none"),
    (r"^AuthenticationError", _LATER_S, "refuses the user or the password"),
    (
        r"(?i)no permissions? to access|permissions to access",
        _LATER_S,
        "does not let its user use the keys of this service: allow ~dmn:* in its ACL",
    ),
    (
        r"has no permissions|ACL failure in script|can't run this command|^NoPermissionError",
        _LATER_S,
        "does not let its user run {command}: allow it in its ACL, and scripts (EVAL, EVALSHA) too",
    ),
    (r"^ReadOnlyError|READONLY\b", _SOON_S, "is a read-only replica: name its primary, or use Sentinels"),
    (r"^OutOfMemoryError|\bOOM\b", _LATER_S, "has no memory left: raise its maxmemory, or remove tenants"),
    (r"\bMISCONF\b", _LATER_S, "cannot write to its disk and takes no changes: make room, and read its log"),
    (r"^BusyLoadingError", _SOON_S, "is still loading its data"),
    (r"^MasterDownError", _SOON_S, "is a replica that has lost its primary"),
    (r"cluster support disabled", _LATER_S, "is no cluster: use redis:// (or rediss://)"),
    (
        r"^ClusterDownError|^SlotNotCoveredError|slots are not covered|CLUSTERDOWN",
        _SOON_S,
        "is a cluster that is down: some of its slots have no primary",
    ),
    (r"^TryAgainError|^ClusterError", _SOON_S, "is moving data between its nodes, and was not done with it in time"),
    (r"^MovedError|^AskError", _LATER_S, "is a node of a cluster: use redis+cluster:// (or rediss+cluster://)"),
    (r"^MaxConnectionsError|No connection available", _SOON_S, "is not asked: all connections to it are in use"),
    (r"max number of clients", _SOON_S, "has as many clients as it takes: raise its maxclients"),
    (r"\bBUSY \w+ is busy", _SOON_S, "is busy with a script that does not end"),
    (r"\bNOREPLICAS\b", _SOON_S, "has too few replicas to take changes (min-replicas-to-write)"),
    (r"\bDENIED\b", _LATER_S, "is in protected mode and lets nobody in from outside: give it a password"),
    (
        r"(?i)unknown (?:redis |valkey )?command",
        _LATER_S,
        "does not know {command}: it is disabled or renamed, or the server is too old",
    ),
    (
        r"nonexistent global variable|attempt to (?:index|call)",
        _LATER_S,
        "runs scripts without what ours need (struct, redis.sha1hex): use Redis or Valkey themselves",
    ),
    (r"wrong kind of value", _LATER_S, "holds something else under the keys of this service (dmn:*)"),
    (r"DB index is out of range|invalid DB index", _LATER_S, "has no database of this number"),
    # A host with several addresses that all refuse is one error without a number, which quotes those of all.
    (rf"\[Errno {ECONNREFUSED}\]", _SOON_S, "refuses the connection: no server is running there"),
    (r"^gaierror", _LATER_S, "cannot be found: its host name does not resolve"),
    (
        r"^SSLCertVerificationError",
        _LATER_S,
        "shows a certificate that is not trusted, or is another's: name its authority by ?ssl_ca_certs=FILE",
    ),
    (
        r"(?i)alert certificate required",
        _LATER_S,
        "asks for a certificate of ours: name it and its key by ?ssl_certfile=FILE&ssl_keyfile=FILE",
    ),
    (r"^SSL\w*Error", _LATER_S, "does not speak TLS as it should: is this its TLS port?"),
    (r"^FileNotFoundError", _SOON_S, "is not there: its socket does not exist"),
    (r"^PermissionError", _LATER_S, "cannot be entered: this process may not open its socket"),
    (
        rf"\[Errno (?:{EHOSTUNREACH}|{ENETUNREACH}|{EADDRNOTAVAIL})\]",
        _SOON_S,
        "cannot be reached: there is no way to its host",
    ),
    (r"^TimeoutError", _SOON_S, "did not answer in time"),
)
"""What is found in an error's kind and text, when to come back, and what is said; what says more is first."""

_LOST = (_SOON_S, "cannot be reached, or closed the connection")


def _meaning(causes: Sequence[BaseException]) -> tuple[float, str]:
    """Return when to come back, and what is said of the store."""
    # A pipeline puts the command before what the server said to it.
    words = (str(one).rpartition("of pipeline caused error: ")[2] for one in causes)
    texts = [f"{type(one).__name__}: {said}" for one, said in zip(causes, words, strict=True)]
    for text in texts:
        for pattern, wait_s, says in _MEANINGS:
            if re.search(pattern, text, re.DOTALL):
                return wait_s, says.format(command=_command_in(texts))
    if any(isinstance(one, told.ConnectionError | OSError) for one in causes):
        return _LOST
    return _LATER_S, f"answers with an error that this service does not know ({type(causes[0]).__name__})"


def _command_in(texts: Sequence[str]) -> str:
    """Return which command the server speaks of, as far as it says."""
    found = (re.search(r"(?:command|run the),? ['`\u2018]([\w|.-]{1,40})", text) for text in texts)
    return next((f"the command {one[1].lower()!r}" for one in found if one), "a command that it needs")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from: redis-py wraps the system's errors, and more than once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
