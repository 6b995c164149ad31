"""URLs, the meaning of errors, and the ways through a cluster, without a network."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions as told
from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.sentinel import MasterNotFoundError
from redis.crc import key_slot

from service.stores.connection import client as client_module
from service.stores.connection import cluster as cluster_module
from service.stores.connection.errors import down
from service.stores.connection.pools import LocalConnection, connect
from service.stores.connection.url import parse

SECRET = "s3cr3t-pässword"
QUOTED = "s3cr3t-p%C3%A4ssword"

Address = tuple[str, int]


def kwargs(url: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """Return what the connections of a URL's client are made with."""
    return dict(connect(url, timeout_s=timeout_s).connection_pool.connection_kwargs)


# URLs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kind", "expected"),
    [
        ("redis://host", Connection, {"host": "host", "port": 6379, "db": 0, "username": None, "password": None}),
        ("redis://host:1234/7", Connection, {"host": "host", "port": 1234, "db": 7}),
        ("redis://host?db=7", Connection, {"host": "host", "db": 7}),
        ("redis://[::1]:1234", Connection, {"host": "::1", "port": 1234}),
        ("redis://[2001:db8::0:1]", Connection, {"host": "2001:db8::1", "port": 6379}),
        ("rediss://host", SSLConnection, {"host": "host", "port": 6379}),
        ("rediss://host?ssl_check_hostname=false", SSLConnection, {"ssl_check_hostname": False}),
        ("rediss://host?ssl_cert_reqs=none", SSLConnection, {"ssl_cert_reqs": "none"}),
        ("unix:///run/valkey.sock", UnixDomainSocketConnection, {"path": "/run/valkey.sock", "db": 0}),
        ("unix:///run/a%20b.sock?db=2", UnixDomainSocketConnection, {"path": "/run/a b.sock", "db": 2}),
    ],
)
def test_a_url_says_where_the_store_is(url: str, kind: type, expected: dict[str, Any]) -> None:
    client = connect(url)
    assert issubclass(client.connection_pool.connection_class, kind)
    assert expected.items() <= client.connection_pool.connection_kwargs.items()


@pytest.mark.parametrize(
    "form", ["redis://{}host", "rediss://{}host", "unix://{}/s.sock", "redis+sentinel://{}host/service"]
)
@pytest.mark.parametrize(
    ("login", "username", "password"),
    [
        ("", None, None),
        (":p%40%2F%3F%23%3A%25+w@", None, "p@/?#:%+w"),
        ("ann:pw@", "ann", "pw"),
        ("an%3An:pw@", "an:n", "pw"),
        ("ann@", "ann", None),
        (f":{QUOTED}@", None, SECRET),
        (":a[b@", None, "a[b"),
        (":a:b@", None, "a:b"),
    ],
)
def test_user_and_password_come_decoded_whatever_the_scheme(
    form: str, login: str, username: str | None, password: str | None
) -> None:
    given = kwargs(form.format(login))
    assert (given["username"], given["password"]) == (username, password)


def test_sentinels_are_named_all_with_the_service_and_its_database() -> None:
    pool: Any = connect("redis+sentinel://a,b:7,[::1]:8/my%2Fname/3").connection_pool
    asked = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
    assert [(one["host"], one["port"]) for one in asked] == [("a", 26379), ("b", 7), ("::1", 8)]
    assert (pool.service_name, pool.connection_kwargs["db"]) == ("my/name", 3)


def test_sentinels_have_a_password_of_their_own() -> None:
    pool: Any = connect("redis+sentinel://u:p@a/s?sentinel_username=su&sentinel_password=s%26p+").connection_pool
    (asked,) = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
    assert (asked["username"], asked["password"]) == ("su", "s&p+")
    pool = connect("redis+sentinel://u:p@a/s").connection_pool
    (asked,) = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
    assert (asked["username"], asked["password"]) == (None, None)


def test_over_tls_the_sentinels_are_asked_over_tls_too(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.touch()
    pool: Any = connect(f"rediss+sentinel://a/s?ssl_ca_certs={ca}").connection_pool
    assert issubclass(pool.connection_class, SSLConnection)
    (asked,) = [one.connection_pool for one in pool.sentinel_manager.sentinels]
    assert asked.connection_class is SSLConnection
    assert asked.connection_kwargs["ssl_ca_certs"] == pool.connection_kwargs["ssl_ca_certs"] == str(ca)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:{}@h:1/2", "at h:1"),
        ("redis://:{}@[::1]:1", "at [::1]:1"),
        ("unix://:{}@/run/s.sock", "at /run/s.sock"),
        ("redis+cluster://:{}@a:1,b", "at a:1, b:6379"),
        ("redis+sentinel://:{}@a,b:2/s?sentinel_password={}", "'s' of the Sentinels at a:26379, b:2"),
    ],
)
def test_a_client_shows_where_it_goes_and_no_password(url: str, shown: str) -> None:
    client: Any = connect(url.format(QUOTED, QUOTED))
    assert client.shown == shown
    for secret in (SECRET, QUOTED):
        assert secret not in repr(parse(url.format(QUOTED, QUOTED)))


WRONG = {
    "": "begin with",
    "host:6379": "begin with",
    "http://host": "begin with",
    "REDIS:host": "begin with",
    "redis://": "no host",
    "redis://u:{}@": "no host",
    "redis:///0": "no host",
    "redis://u:{}@:6379": "no host",
    "redis://u:{}@host:": "port",
    "redis://u:{}@host:0": "port",
    "redis://u:{}@host:65536": "port",
    "redis://u:{}@host:port": "port",
    "redis://u:{}@host:٣": "port",
    "redis://::1:6379": "brackets",
    "redis://[::1:6379": "brackets",
    "redis://[::1]x": "brackets",
    "redis://[host]:6379": "IPv6",
    "redis://a,b": "several hosts",
    "redis://host/zero": "database",
    "redis://host/-1": "database",
    "redis://host/0 ": "space",
    "redis://:{}\n@host": "control",
    "redis://:a/{}@host": "%2F",
    "redis://:a?{}@host": "%3F",
    "redis://:a#{}@host": "%23",
    "redis://u:{}@host?socket_timeout=1": "socket_timeout",
    "redis://u:{}@host?{}=1": "option",
    "redis://host?ssl_ca_certs=/x": "ssl_ca_certs",
    "rediss://host?ssl_ca_certs=/no/such/file": "not there",
    "rediss://host?ssl_check_hostname=perhaps": "neither true nor false",
    "rediss://host?ssl_cert_reqs=some": "ssl_cert_reqs",
    "unix://": "no path",
    "unix://run/s.sock": "begin with /",
    "redis+sentinel://u:{}@a:1,b:2": "service",
    "redis+sentinel://a:1,b:2/": "service",
    "redis+sentinel://a:1,:2/s": "no host",
    "redis+sentinel://a:1/s/zero": "database",
    "redis+sentinel://a:1/s?db=1": "db",
    "redis+cluster://u:{}@a:1/1": "only one",
    "redis+cluster://a:1,b:x": "port",
    "redis+cluster://a:1?db=0": "option",
}


@pytest.mark.parametrize(("url", "words"), WRONG.items())
def test_a_malformed_url_is_refused_with_what_is_wrong_and_one_that_is_right(url: str, words: str) -> None:
    with pytest.raises(ValueError, match="store URL") as wrong:
        connect(url.replace("{}", SECRET))
    said = str(wrong.value)
    assert words in said
    assert "://" in said
    assert said.endswith((".", ")."))
    assert "\n" not in said
    assert SECRET not in said


# Deadlines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["redis://h", "rediss://h", "unix:///s", "redis+sentinel://a,b/s"])
def test_every_wait_has_a_deadline(url: str) -> None:
    given = kwargs(url, timeout_s=0.75)
    assert given["socket_timeout"] == given["socket_connect_timeout"] == 0.75
    pool: Any = connect(url, timeout_s=0.75).connection_pool
    assert pool.timeout == 0.75
    for one in getattr(getattr(pool, "sentinel_manager", None), "sentinels", ()):
        assert one.connection_pool.connection_kwargs["socket_timeout"] == 0.75 / 2
        assert one.connection_pool.connection_kwargs["retry"].get_retries() == 0


@pytest.mark.parametrize("url", ["redis://h", "unix:///s", "redis+sentinel://a/s"])
async def test_a_broken_connection_is_tried_again_a_few_times_and_silence_never(url: str) -> None:
    retry, tries = kwargs(url)["retry"], 0

    async def once(error: Exception) -> None:
        nonlocal tries
        tries += 1
        raise error

    async def failed(_: Exception) -> None:
        pass

    with pytest.raises(told.ConnectionError):
        await retry.call_with_retry(lambda: once(told.ConnectionError()), failed)
    assert tries == 3
    assert sum(retry._backoff.compute(failures) for failures in (1, 2)) <= 0.1
    with pytest.raises(told.TimeoutError):
        await retry.call_with_retry(lambda: once(told.TimeoutError()), failed)
    assert tries == 4


async def test_a_command_ends_after_twice_the_timeout_whatever_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def for_ever(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Redis, "execute_command", for_ever)
    client = connect("redis://h", timeout_s=0.01)
    with pytest.raises(TimeoutError) as late:
        await client.ping()
    assert "in time" in down(late.value).detail
    monkeypatch.setattr(client_module.Single, "execute_command", for_ever)
    client = connect("redis+cluster://h", timeout_s=0.01)
    for call in (client.get("k"), client.pipeline().get("k").execute()):
        with pytest.raises(TimeoutError):
            await call


async def test_no_sentinel_is_forgotten_when_many_callers_ask_at_once() -> None:
    class Watcher:
        def __init__(self, *, alive: bool) -> None:
            self.alive = alive

        async def sentinel_masters(self) -> dict[str, Any]:
            await asyncio.sleep(0)
            if not self.alive:
                raise told.ConnectionError
            state = {"is_master": True, "is_sdown": False, "is_odown": False, "num-other-sentinels": 2}
            return {"s": state | {"ip": "primary", "port": 1}}

    pool: Any = connect("redis+sentinel://a,b,c/s").connection_pool
    watchers = [Watcher(alive=alive) for alive in (False, False, True)]
    manager = pool.sentinel_manager
    manager.sentinels, manager._all = list(watchers), tuple(watchers)
    assert await asyncio.gather(*(pool.get_master_address() for _ in range(5))) == [("primary", 1)] * 5
    assert manager.sentinels[0] is watchers[2]
    assert set(manager.sentinels) == set(watchers)


# What errors mean -----------------------------------------------------------------------------------------------------


def caused(outer: Exception, inner: Exception) -> Exception:
    """Return an error as redis-py makes it: out of another, by `from` or just while handling it."""
    outer.__context__ = inner
    return outer


REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, f"Connect call failed ('{SECRET}', 1)")
BOTH_REFUSED = OSError(f"Multiple exceptions: [Errno {errno.ECONNREFUSED}] a, [Errno {errno.ECONNREFUSED}] b")
UNTRUSTED = ssl.SSLCertVerificationError(1, "certificate verify failed")
ALERT = ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required (_ssl.c:2580)")
PIPELINED = f"Command # 1 (HSET {SECRET} unknown command READONLY) of pipeline caused error: "

MEANINGS: dict[str, tuple[BaseException, str]] = {
    "refused": (caused(told.ConnectionError(f"Error 111 connecting to {SECRET}:1"), REFUSED), "refuses the connection"),
    "refused by all addresses": (caused(told.ConnectionError("Error"), BOTH_REFUSED), "refuses the connection"),
    "refused, bare": (REFUSED, "refuses the connection"),
    "no name": (caused(told.ConnectionError("Error -2"), socket.gaierror(-2, "Name")), "does not resolve"),
    "no way": (caused(told.ConnectionError("e"), OSError(errno.EHOSTUNREACH, "No route")), "no way to its host"),
    "no socket": (caused(told.ConnectionError("e"), FileNotFoundError(2, "No such file")), "socket does not exist"),
    "closed socket": (caused(told.ConnectionError("e"), PermissionError(13, "denied")), "may not open its socket"),
    "silence": (told.TimeoutError(f"Timeout reading from {SECRET}"), "did not answer in time"),
    "silence, ours": (TimeoutError(), "did not answer in time"),
    "hung up": (told.ConnectionError("Connection closed by server."), "closed the connection"),
    "hung up, bare": (ConnectionResetError(104, "Connection reset by peer"), "closed the connection"),
    "untrusted": (caused(told.ConnectionError("e"), UNTRUSTED), "ssl_ca_certs"),
    "not known over TLS": (caused(told.ConnectionError("e"), ALERT), "ssl_certfile"),
    "no TLS": (caused(told.ConnectionError("e"), ssl.SSLError(1, "WRONG_VERSION_NUMBER")), "TLS port"),
    "NOAUTH": (told.AuthenticationError("Authentication required."), "asks for a password"),
    "WRONGPASS": (told.AuthenticationError(f"invalid username-password pair {SECRET}"), "refuses the user"),
    "WRONGPASS, wrapped": (told.ConnectionError(told.AuthenticationError("invalid")), "closed the connection"),
    "AUTH, for nothing": (
        told.AuthenticationError("AUTH <password> called without any password configured for the default user."),
        "has no password",
    ),
    "NOPERM": (told.NoPermissionError(f"User {SECRET} has no permissions to run the 'eval' command"), "'eval'"),
    "NOPERM of 6": (
        told.NoPermissionError("this user has no permissions to run the 'eval' command or its subcommand"),
        "'eval'",
    ),
    "NOPERM, keys": (told.NoPermissionError("No permissions to access a key"), "~dmn:*"),
    "NOPERM, keys of 6": (
        told.NoPermissionError("this user has no permissions to access one of the keys used as arguments"),
        "~dmn:*",
    ),
    "NOPERM in a script": (
        told.ResponseError("ACL failure in script: User x has no permissions to run the 'hset' command script: 1"),
        "'hset'",
    ),
    "READONLY": (told.ReadOnlyError("You can't write against a read only replica."), "read-only replica"),
    "READONLY in a script of 6": (
        told.ResponseError("Error running script (call to f_1): @user_script:1: -READONLY You can't write"),
        "read-only replica",
    ),
    "MISCONF": (told.ResponseError("MISCONF Redis is configured to save RDB snapshots, but"), "its disk"),
    "MISCONF in a pipeline": (told.ResponseError(f"{PIPELINED}MISCONF Errors writing to the AOF file"), "its disk"),
    "OOM": (told.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), "no memory left"),
    "OOM in a script of 6": (
        told.ResponseError("Error running script (call to f_1): @user_script:1: -OOM command not allowed"),
        "no memory left",
    ),
    "LOADING": (told.BusyLoadingError("Redis is loading the dataset in memory"), "loading its data"),
    "BUSY": (told.ResponseError("BUSY Redis is busy running a script."), "busy with a script"),
    "NOREPLICAS": (told.ResponseError("NOREPLICAS Not enough good replicas to write."), "too few replicas"),
    "MASTERDOWN": (told.MasterDownError("Link with MASTER is down"), "lost its primary"),
    "CLUSTERDOWN": (told.ClusterDownError("The cluster is down"), "cluster that is down"),
    "TRYAGAIN": (told.TryAgainError("Multiple keys request during rehashing of slot"), "moving data"),
    "TRYAGAIN, too often": (told.ClusterError("slot 7 was not whole in time"), "moving data"),
    "MOVED": (told.MovedError("3999 127.0.0.1:6381"), "redis+cluster://"),
    "ASK": (told.AskError("3999 127.0.0.1:6381"), "redis+cluster://"),
    "no cluster": (told.ResponseError("This instance has cluster support disabled"), "is no cluster"),
    "too many here": (told.MaxConnectionsError("Too many connections"), "in use"),
    "too many here, in vain": (told.ConnectionError("No connection available."), "in use"),
    "too many there": (told.ConnectionError("max number of clients reached"), "maxclients"),
    "DENIED": (told.ResponseError("DENIED Redis is running in protected mode because"), "protected mode"),
    "unknown command": (told.ResponseError(f"unknown command 'EVAL', with args beginning with: '{SECRET}'"), "'eval'"),
    "unknown command of 5": (
        told.ResponseError(f"unknown command `EVAL`, with args beginning with: `{SECRET}`"),
        "'eval'",
    ),
    "poor scripts": (told.ResponseError("Script attempted to access nonexistent global variable 'struct'"), "struct"),
    "WRONGTYPE": (told.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), "dmn:*"),
    "no database": (told.ResponseError("DB index is out of range"), "no database"),
    "Sentinels, unknown name": (MasterNotFoundError("No master found for 'x'"), "no primary of this name"),
    "Sentinels, away": (
        MasterNotFoundError(f"No master found for 'x' : {SECRET} - network:ConnectionError"),
        "some do not",
    ),
    "Sentinels, closed": (
        MasterNotFoundError(f"No master for 'x' : {SECRET} - auth:AuthenticationError"),
        "sentinel_pass",
    ),
    "anything else": (told.ResponseError(f"ERR {SECRET}"), "ResponseError"),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_an_error_becomes_one_sentence_that_holds_nothing_secret_and_says_when_to_come_back(name: str) -> None:
    error, words = MEANINGS[name]
    if name == "WRONGPASS, wrapped":  # as redis-py does on a Unix socket
        error.__cause__, words = told.AuthenticationError("invalid"), "refuses the user"
    found = down(error)
    assert words in found.detail
    assert found.detail.startswith("The store ")
    assert found.detail.endswith(".")
    assert "\n" not in found.detail
    assert SECRET not in found.detail
    assert found.retry_after_s is not None
    assert found.retry_after_s > 0
    assert down(error, "at h:1").detail == found.detail.replace("The store", "The store at h:1", 1)


def test_what_an_error_came_from_is_looked_at_once_even_in_a_circle() -> None:
    error = told.ConnectionError("one")
    error.__cause__ = told.ConnectionError("other")
    error.__cause__.__cause__ = error
    assert "closed the connection" in down(error).detail


@pytest.mark.parametrize("error", [None, told.ConnectionError("gone")], ids=["sent", "broken"])
async def test_a_cancellation_that_the_library_drops_while_it_sends_is_raised(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """As `asyncio.wait_for` does in Python 3.11, where what it waits for is done or has failed at the same moment."""
    sending = asyncio.Event()

    async def send(*_: Any, **__: Any) -> None:
        sending.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        if error is not None:
            raise error

    monkeypatch.setattr(AbstractConnection, "send_packed_command", send)
    task = asyncio.create_task(LocalConnection(path="/no/such.sock").send_packed_command(b""))
    await sending.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


# A cluster ------------------------------------------------------------------------------------------------------------

A, B, C = ("a", 1), ("b", 2), ("c", 3)
HALF = 8192
LOW, HIGH = "cat", "k0"
"""Keys of the lower and the upper half of the slots."""


class Node:
    """A node that answers what a test tells it; it knows who owns which half of the slots."""

    patience_s, connection_pool = 60.0, None

    def __init__(self, world: World, address: Address) -> None:
        self.world, self.address, self.shown = world, address, f"at {address[0]}"

    async def execute_command(self, *args: Any, **_: Any) -> Any:
        self.world.log.append((self.address[0], *args))
        if self.address in self.world.dead:
            raise told.ConnectionError("gone")
        if self.address in self.world.held:
            if args == ("CLUSTER", "SLOTS"):
                await asyncio.Event().wait()  # until it is cancelled
            raise told.TimeoutError("silence")
        if args == ("CLUSTER", "SLOTS"):
            return self.world.slots()
        return self.world.answer(self.address, args)

    async def asking(self, *args: Any, **_: Any) -> Any:
        self.world.log.append((self.address[0], "ASKING", *args))
        return self.world.answer(self.address, ("ASKING", *args))

    def pipeline(self, **_: Any) -> Batch:
        return Batch(self)

    async def aclose(self) -> None:
        self.world.log.append((self.address[0], "closed"))


class Batch:
    """Commands for one node that go together; the log has their number."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.commands: list[Sequence[Any]] = []

    def execute_command(self, *args: Any, **_: Any) -> None:
        self.commands.append(args)

    async def execute(self, *, raise_on_error: bool) -> list[Any]:
        assert not raise_on_error
        world, address = self.node.world, self.node.address
        world.log.append((address[0], len(self.commands)))
        if address in world.dead:
            raise told.ConnectionError("gone")
        if address in world.held:
            raise told.TimeoutError("silence")
        return [self._answer(args) for args in self.commands]

    def _answer(self, args: Sequence[Any]) -> Any:
        try:
            return self.node.world.answer(self.node.address, args)
        except told.ResponseError as error:
            return error


class World:
    """Nodes A and B, which own the lower and the upper half; `answer` says what a node gives to a command."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.dead: set[Address] = set()
        self.held: set[Address] = set()
        self.owners: tuple[Address | None, Address | None] = (A, B)
        self.answer: Callable[[Address, Sequence[Any]], Any] = lambda at, _: at[0]

    def slots(self) -> list[Any]:
        spans = zip(((0, HALF - 1), (HALF, 2 * HALF - 1)), self.owners, strict=True)
        return [[first, last, [at[0].encode(), at[1], b"id"]] for (first, last), at in spans if at is not None]

    def asked(self) -> list[tuple[Any, ...]]:
        """Return what was asked but for who owns what, and forget it."""
        found = [one for one in self.log if one[1:] != ("CLUSTER", "SLOTS")]
        self.log.clear()
        return found


@pytest.fixture
def world() -> World:
    assert key_slot(LOW.encode()) < HALF <= key_slot(HIGH.encode())
    return World()


@pytest.fixture
async def cluster(world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a cluster's client over the nodes of the world."""
    monkeypatch.setattr(cluster_module, "_PAUSES_S", (0.0, 0.0))
    make: Any = partial(Node, world)
    return cluster_module.Cluster([A, C], make, shown="", patience_s=60.0)


async def test_a_command_goes_to_the_node_that_has_its_key(world: World, cluster: Any) -> None:
    assert [await cluster.get(LOW), await cluster.get(HIGH)] == ["a", "b"]
    assert await cluster.eval("script", 2, HIGH, f"{{{HIGH}}}x", LOW) == "b"
    assert await cluster.execute_command("EVALSHA", "sha", 1, LOW) == "a"
    assert await cluster.hget(HIGH.encode(), "f") == "b"
    assert [one[0] for one in world.asked()] == ["a", "b", "b", "a", "b"]


async def test_a_command_without_a_key_goes_to_every_primary(world: World, cluster: Any) -> None:
    await cluster.ping()
    await cluster.eval("script", 0, LOW)
    assert sorted(one[:2] for one in world.asked()) == [("a", "EVAL"), ("a", "PING"), ("b", "EVAL"), ("b", "PING")]


async def test_who_owns_what_is_asked_once_for_all(world: World, cluster: Any) -> None:
    await asyncio.gather(*(cluster.get(key) for key in (LOW, HIGH) * 5))
    assert [one for one in world.log if one[1:] == ("CLUSTER", "SLOTS")] == [("a", "CLUSTER", "SLOTS")]


async def test_a_slot_that_moved_is_followed_and_found_at_once_from_then_on(world: World, cluster: Any) -> None:
    def moved(at: Address, _: Sequence[Any]) -> str:
        if at == A:
            raise told.MovedError(f"{key_slot(LOW.encode())} c:3")
        return at[0]

    world.answer = moved
    assert [await cluster.get(LOW), await cluster.get(LOW)] == ["c", "c"]
    assert world.asked() == [("a", "GET", LOW), ("c", "GET", LOW), ("c", "GET", LOW)]


async def test_a_redirection_without_a_host_means_the_host_that_gave_it(world: World, cluster: Any) -> None:
    def moved(at: Address, _: Sequence[Any]) -> Address:
        if at == A:
            raise told.MovedError(f"{key_slot(LOW.encode())} :99")
        return at

    world.answer = moved
    assert await cluster.get(LOW) == ("a", 99)


async def test_a_slot_on_its_way_is_asked_for_where_it_goes_for_this_command_only(world: World, cluster: Any) -> None:
    def ask(at: Address, args: Sequence[Any]) -> str:
        if at == A:
            raise told.AskError(f"{key_slot(LOW.encode())} c:3")
        assert args[0] == "ASKING"
        return at[0]

    world.answer = ask
    assert [await cluster.get(LOW), await cluster.get(LOW)] == ["c", "c"]
    assert world.asked() == [("a", "GET", LOW), ("c", "ASKING", "GET", LOW)] * 2


async def test_keys_on_both_nodes_are_waited_for_but_not_for_ever(
    world: World, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = 6
    monkeypatch.setattr(cluster_module, "_TURNS", turns)
    answers: list[Any] = [told.TryAgainError("rehashing")] * 3 + ["whole"]

    def try_again(_: Address, __: Sequence[Any]) -> Any:
        answer = answers.pop(0) if answers else told.TryAgainError("rehashing")
        if isinstance(answer, Exception):
            raise answer
        return answer

    world.answer = try_again
    assert await cluster.get(LOW) == "whole"
    with pytest.raises(told.ClusterError):
        await cluster.get(LOW)
    assert len(world.asked()) == 4 + turns


async def test_when_a_node_is_gone_the_others_are_asked_who_has_its_slots(world: World, cluster: Any) -> None:
    assert await cluster.get(LOW) == "a"
    world.dead, world.owners = {A}, (C, B)
    assert await cluster.get(LOW) == "c"
    assert world.asked()[-1] == ("c", "GET", LOW)


async def test_a_node_that_stays_away_is_given_up_after_three_tries(world: World, cluster: Any) -> None:
    world.dead = {B}
    with pytest.raises(told.ConnectionError):
        await cluster.get(HIGH)
    assert world.asked() == [("b", "GET", HIGH)] * 3
    assert await cluster.get(LOW) == "a"


async def test_a_seed_that_is_gone_does_not_hide_the_cluster(world: World, cluster: Any) -> None:
    world.dead, world.owners = {A}, (C, B)
    assert await cluster.get(LOW) == "c"


async def test_a_node_that_is_silent_does_not_keep_the_others_from_being_asked(world: World, cluster: Any) -> None:
    world.held, world.owners = {A}, (C, B)
    assert [await cluster.get(LOW), await cluster.get(HIGH)] == ["c", "b"]
    await cluster.nodes()
    assert world.log[-1] == ("c", "CLUSTER", "SLOTS")


async def test_a_node_that_is_silent_is_asked_no_more_once_another_has_its_slots(world: World, cluster: Any) -> None:
    assert await cluster.get(LOW) == "a"
    world.held = {A}
    with pytest.raises(told.TimeoutError):
        await cluster.get(LOW)
    assert world.asked() == [("a", "GET", LOW)] * 2
    world.owners = (C, B)
    assert await cluster.get(LOW) == "c"
    assert world.asked() == [("c", "GET", LOW)]


async def test_a_silence_in_which_a_slot_found_another_owner_costs_no_error(world: World, cluster: Any) -> None:
    assert await cluster.get(LOW) == "a"
    world.held, world.owners = {A}, (C, B)
    assert await cluster.get(LOW) == "c"
    assert world.asked() == [("a", "GET", LOW)] * 2 + [("c", "GET", LOW)]


async def test_a_cluster_of_which_no_node_answers_says_why(world: World, cluster: Any) -> None:
    world.dead = {A, B, C}
    with pytest.raises(told.ConnectionError, match="gone"):
        await cluster.get(LOW)


async def test_a_slot_that_nobody_has_is_a_cluster_that_is_down(world: World, cluster: Any) -> None:
    world.owners = (A, None)
    assert await cluster.get(LOW) == "a"
    with pytest.raises(told.ClusterDownError):
        await cluster.get(HIGH)
    with pytest.raises(told.ClusterDownError):
        await cluster.nodes()


async def test_an_error_of_the_command_itself_is_not_tried_again(world: World, cluster: Any) -> None:
    def full(_: Address, __: Sequence[Any]) -> Any:
        raise told.OutOfMemoryError

    world.answer = full
    with pytest.raises(told.OutOfMemoryError):
        await cluster.set(LOW, 1)
    assert len(world.asked()) == 1


async def test_commands_of_a_pipeline_go_together_to_each_node_and_answers_come_in_order(
    world: World, cluster: Any
) -> None:
    batch = cluster.pipeline(transaction=False)
    for key in (HIGH, LOW, HIGH):
        batch.hmget(key, "f")
    assert await batch.execute() == ["b", "a", "b"]
    assert sorted(world.asked()) == [("a", 1), ("b", 2)]
    assert await batch.execute() == []


async def test_a_pipeline_follows_what_moved_and_finds_what_is_gone(world: World, cluster: Any) -> None:
    assert await cluster.get(LOW) == "a"

    def moved(at: Address, _: Sequence[Any]) -> str:
        if at == B:
            raise told.MovedError(f"{key_slot(HIGH.encode())} c:3")
        return at[0]

    world.answer = moved
    assert await cluster.pipeline().get(HIGH).get(LOW).execute() == ["c", "a"]
    world.dead, world.owners = {A}, (B, C)
    world.answer = lambda at, _: at[0]
    assert await cluster.pipeline().get(HIGH).get(LOW).execute() == ["c", "b"]


async def test_a_pipeline_waits_for_a_silent_node_once(world: World, cluster: Any) -> None:
    assert await cluster.get(LOW) == "a"
    world.asked()
    world.held = {A}
    with pytest.raises(told.TimeoutError):
        await cluster.pipeline().get(LOW).get(HIGH).execute()
    assert sorted(world.asked()) == [("a", 1), ("b", 1)]
    silence, answer = await cluster.pipeline().get(LOW).get(HIGH).execute(raise_on_error=False)
    assert isinstance(silence, told.TimeoutError)
    assert answer == "b"
    world.owners = (C, B)
    assert await cluster.pipeline().get(LOW).get(HIGH).execute() == ["c", "b"]


async def test_what_nobody_owns_costs_a_pipeline_no_other_answer(world: World, cluster: Any) -> None:
    world.owners = (A, None)
    answer, fault = await cluster.pipeline().get(LOW).get(HIGH).execute(raise_on_error=False)
    assert answer == "a"
    assert isinstance(fault, told.ClusterDownError)


async def test_a_pipeline_raises_the_first_error_that_a_command_met(world: World, cluster: Any) -> None:
    def full(_: Address, args: Sequence[Any]) -> Any:
        if args[0] == "SET":
            raise told.OutOfMemoryError
        return 1

    world.answer = full
    with pytest.raises(told.OutOfMemoryError):
        await cluster.pipeline().get(HIGH).set(LOW, 1).execute()
    answers = await cluster.pipeline().get(HIGH).set(LOW, 1).execute(raise_on_error=False)
    assert [type(answer) for answer in answers] == [int, told.OutOfMemoryError]


async def test_closing_a_cluster_closes_every_node(world: World, cluster: Any) -> None:
    await cluster.ping()
    world.log.clear()
    await cluster.aclose()
    assert sorted(world.log) == [("a", "closed"), ("b", "closed")]
