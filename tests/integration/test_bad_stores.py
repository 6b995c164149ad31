"""Servers that are unfit, away or in trouble: one clear line at start, one clear sentence in a call."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis as Admin
from redis.asyncio import Redis

from service.domain.records import Remembered
from service.errors import StoreDown
from service.stores.connection.checks import check
from service.stores.connection.pools import connect
from service.stores.redis.store import RedisStore
from tests.support import servers
from tests.support.servers import BINARIES, HOST, SERVICE, Cluster, Running, cluster, sentinel, server, until

PATIENCE_S = 60.0
MOMENT_S = 0.2
"""How long something that never answers is waited for."""

PASSWORD = "p@ss/w:rd%"
QUOTED = "p%40ss%2Fw%3Ard%25"
DMN = Path(sys.executable).with_name("dmn")
ROOT = Path(__file__).parents[2]

ANSWER = Remembered(digest="digest", status=200, media_type="text/plain", body=b"body")

Call = Callable[[RedisStore], Awaitable[Any]]
WRITES: dict[str, Call] = {
    "command": lambda store: store.claim("zoo", "sweep", 60.0),
    "script": lambda store: store.remember("zoo", "key", ANSWER),
}


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.slow) for kind in BINARIES], scope="module")
def binary(request: pytest.FixtureRequest) -> str:
    """Return a server to run, of each kind; every test that runs one is of the slow tier."""
    found = BINARIES[request.param]
    if found is None:
        pytest.skip(f"no {request.param} server is installed")
    return str(found)


@pytest.fixture
def running(binary: str) -> Iterator[Running]:
    """Yield a server that is as it should be."""
    with server(binary) as own:
        yield own


@contextmanager
def admin(own: Running, **login: str) -> Iterator[Any]:
    """Give a client that changes a server's settings."""
    with Admin(unix_socket_path=str(own.socket), **login) as client:
        yield client


@asynccontextmanager
async def opened(url: str, timeout_s: float = PATIENCE_S) -> AsyncIterator[Redis]:
    """Give a store's client, and close it."""
    client = connect(url, timeout_s=timeout_s)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def store_at(url: str, timeout_s: float = PATIENCE_S) -> AsyncIterator[RedisStore]:
    """Give a store that has not been checked: something happened to its server since."""
    async with opened(url, timeout_s) as client:
        yield RedisStore(client, clock=time.time, remember_s=60.0, remember_bytes=1000)


async def refused(url: str, timeout_s: float = PATIENCE_S, **options: float) -> str:
    """Return why a store is refused at start: one line, which shows where it is and no password."""
    async with opened(url, timeout_s) as client:
        with pytest.raises(StoreDown) as unfit:
            await check(client, **options)
    assert "\n" not in unfit.value.detail
    assert unfit.value.detail.startswith("The store ")
    assert unfit.value.detail.endswith(".")
    assert PASSWORD not in unfit.value.detail
    return unfit.value.detail


async def fails(call: Awaitable[Any]) -> str:
    """Return what a call says that must find the store down, with a time to come back and without an address."""
    with pytest.raises(StoreDown) as away:
        await call
    assert away.value.retry_after_s
    assert away.value.detail.startswith("The store ")
    assert ".sock" not in away.value.detail
    assert HOST not in away.value.detail
    return away.value.detail


def with_login(own: Running, login: str) -> str:
    return own.url.replace("://", f"://{login}@")


# At start -------------------------------------------------------------------------------------------------------------


async def test_a_good_server_is_taken_and_nothing_is_left_in_it(running: Running) -> None:
    async with opened(running.url) as client:
        await check(client)
        assert await client.dbsize() == 0


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"redis://{HOST}:1", f"at {HOST}:1 refuses the connection"),
        ("redis://localhost:1", "at localhost:1 refuses the connection"),
        (f"rediss://{HOST}:1", f"at {HOST}:1 refuses the connection"),
        (f"redis+cluster://{HOST}:1,{HOST}:2", f"at {HOST}:1, {HOST}:2 refuses the connection"),
        (f"redis+sentinel://{HOST}:1/memories", "'memories' of the Sentinels at"),
        ("unix:///no/such.sock", "at /no/such.sock is not there"),
        ("redis://no-such-host.invalid", "at no-such-host.invalid:6379 cannot be found: its host name"),
    ],
)
async def test_a_server_that_is_not_there_is_said_to_be_so(url: str, words: str) -> None:
    assert words in await refused(url)


async def test_passwords_are_asked_for_compared_and_not_sent_where_there_are_none(binary: str) -> None:
    with server(binary, "--requirepass", PASSWORD) as own:
        assert "asks for a password" in await refused(own.url)
        assert "refuses the user or the password" in await refused(with_login(own, ":wrong"))
        assert "refuses the user or the password" in await refused(with_login(own, f"nobody:{QUOTED}"))
        async with opened(with_login(own, f":{QUOTED}")) as client:
            await check(client)
        with admin(own, password=PASSWORD) as client:
            client.config_set("requirepass", "")
        assert "has no password" in await refused(with_login(own, f":{QUOTED}"))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("~dmn:* +@all -@scripting", "'eval'"),
        ("~dmn:* +@all -evalsha", "'evalsha'"),
        ("~dmn:* +@all -info", "'info'"),
        ("~dmn:* +@all -set", "ACL"),
        ("~other:* +@all", "~dmn:*"),
        ("~dmn:* +@all off", "refuses the user"),
    ],
)
async def test_a_user_with_too_narrow_an_acl_is_told_what_it_lacks(running: Running, rules: str, words: str) -> None:
    with admin(running) as client:
        client.execute_command("ACL", "SETUSER", "clip", "on", f">{PASSWORD}", *rules.split())
    assert words in await refused(with_login(running, f"clip:{QUOTED}"))


async def test_a_user_needs_its_own_keys_info_and_nothing_that_is_dangerous(running: Running) -> None:
    with admin(running) as client:
        rules = "~dmn:* +@all -@admin -@dangerous +info"
        client.execute_command("ACL", "SETUSER", "clip", "on", f">{PASSWORD}", *rules.split())
    async with store_at(with_login(running, f"clip:{QUOTED}")) as store:
        await store.check()
        for call in WRITES.values():
            await call(store)
        assert await store.names(after="", limit=10) == []


@pytest.mark.parametrize("command", ["EVAL", "EVALSHA"])
async def test_a_server_without_scripts_is_refused(binary: str, command: str) -> None:
    with server(binary, "--rename-command", command, "") as own:
        assert f"does not know the command '{command.lower()}'" in await refused(own.url)


async def test_a_server_that_may_drop_what_it_holds_is_refused(binary: str) -> None:
    with server(binary, "--maxmemory-policy", "allkeys-lru") as own:
        assert "maxmemory-policy allkeys-lru" in await refused(own.url)


async def test_a_read_only_replica_is_refused(binary: str) -> None:
    with server(binary, "--replicaof", f"{HOST} 1") as own:
        assert "read-only replica" in await refused(own.url)


async def test_a_database_that_is_not_there_is_refused(running: Running) -> None:
    assert "no database of this number" in await refused(f"{running.url}?db=99")


async def test_a_full_server_is_refused(binary: str) -> None:
    with server(binary, "--maxmemory", "1") as own:
        assert "no memory left" in await refused(own.url)


@contextmanager
def still_loading(binary: str, folder: Path) -> Iterator[Running]:
    """Run a server that pauses at each of many keys that it reads, and has minutes to go."""
    kept = ("--dir", str(folder), "--rdbcompression", "no")
    with server(binary, *kept) as own, admin(own) as client:
        client.mset({f"key{number}": os.urandom(2000) for number in range(3000)})
        client.save()
    slow = ("--key-load-delay", "100000", "--loading-process-events-interval-bytes", "1024")
    with server(binary, *kept, *slow) as own:
        try:
            yield own
        finally:
            own.process.kill()  # it would read to the end before it leaves


async def test_a_server_that_loads_is_waited_for_and_not_for_ever(binary: str, tmp_path: Path) -> None:
    with still_loading(binary, tmp_path) as own:
        assert "still loading" in await refused(own.url, loading_s=0.1)
        async with store_at(own.url) as store:
            for call in WRITES.values():
                assert "still loading" in await fails(call(store))
        async with opened(own.url) as client:
            waiting = asyncio.create_task(check(client, loading_s=PATIENCE_S))
            with admin(own) as quick:
                quick.config_set("key-load-delay", 0)
            await waiting
            assert await client.dbsize() == 3000


# In a call ------------------------------------------------------------------------------------------------------------


@contextmanager
def without_a_disk(binary: str, folder: Path) -> Iterator[tuple[Running, Callable[[], None]]]:
    """Run a server whose folder is gone: it cannot save, whoever runs it, as on a full disk. Give what mends it."""
    folder.mkdir()
    more = ("--dir", str(folder), "--save", "3600 1", "--enable-protected-configs", "yes")
    with server(binary, *more) as own, admin(own) as client, ExitStack() as stack:
        # It would not leave without having saved.
        stack.callback(client.config_set, "save", "")

        def saving(result: str) -> None:
            client.bgsave()
            until(f"saving is {result}", lambda: client.info("persistence")["rdb_last_bgsave_status"] == result)

        def mend() -> None:
            folder.mkdir()
            client.config_set("dir", str(folder))
            saving("ok")

        shutil.rmtree(folder)
        saving("err")
        yield own, mend


@pytest.mark.parametrize("call", WRITES)
async def test_a_full_disk_is_told_apart_until_there_is_room_again(binary: str, tmp_path: Path, call: str) -> None:
    with without_a_disk(binary, tmp_path / "data") as (own, mend):
        assert "cannot write to its disk" in await refused(own.url)
        async with store_at(own.url) as store:
            assert "cannot write to its disk" in await fails(WRITES[call](store))
            assert await store.names(after="", limit=1) == []
            mend()
            await WRITES[call](store)


async def test_a_server_that_is_full_takes_nothing_new_and_still_gives(running: Running) -> None:
    """Scripts that begin by making room, as the one for answers does, go on: what they did is never half done."""
    with admin(running) as client:
        async with store_at(running.url) as store:
            await WRITES["script"](store)
            client.config_set("maxmemory", 1)
            assert "no memory left" in await fails(WRITES["command"](store))
            assert await store.recall("zoo", "key") == ANSWER
            client.config_set("maxmemory", 0)
            await WRITES["command"](store)


@pytest.mark.parametrize("call", WRITES)
async def test_a_server_that_became_a_replica_takes_nothing(running: Running, call: str) -> None:
    with admin(running) as client:
        async with store_at(running.url) as store:
            await WRITES[call](store)
            client.execute_command("REPLICAOF", HOST, "1")
            assert "read-only replica" in await fails(WRITES[call](store))
            client.execute_command("REPLICAOF", "NO", "ONE")
            await WRITES[call](store)


@pytest.mark.parametrize("call", WRITES)
async def test_rights_that_are_taken_away_are_named(running: Running, call: str) -> None:
    with admin(running) as client:
        client.execute_command("ACL", "SETUSER", "clip", "on", f">{PASSWORD}", "~dmn:*", "+@all")
        async with store_at(with_login(running, f"clip:{QUOTED}")) as store:
            await WRITES[call](store)
            client.execute_command("ACL", "SETUSER", "clip", "-@scripting", "-set")
            assert {"command": "'set'", "script": "'evalsha'"}[call] in await fails(WRITES[call](store))
            client.execute_command("ACL", "SETUSER", "clip", "resetkeys", "+@all")
            assert "~dmn:*" in await fails(WRITES[call](store))
            client.execute_command("ACL", "SETUSER", "clip", "off")
            client.client_kill_filter(user="clip")
            assert "refuses the user" in await fails(WRITES[call](store))


async def test_keys_that_hold_something_else_are_told_apart(running: Running) -> None:
    with admin(running) as client:
        client.set("dmn:tenants", "not ours")
    async with store_at(running.url) as store:
        assert "something else under the keys" in await fails(store.names(after="", limit=1))


@pytest.mark.parametrize("connected", [False, True], ids=["a new connection", "one that was used"])
async def test_a_server_that_stops_to_answer_costs_a_call_its_timeout(running: Running, *, connected: bool) -> None:
    async with opened(running.url, PATIENCE_S if connected else MOMENT_S) as client:
        store = RedisStore(client, clock=time.time, remember_s=60.0, remember_bytes=1000)
        if connected:
            await store.ping()
        running.process.send_signal(signal.SIGSTOP)
        try:
            client.patience_s = 2 * MOMENT_S  # type: ignore[attr-defined]
            for call in (store.ping(), store.stamps(["zoo"]), *(call(store) for call in WRITES.values())):
                assert "did not answer in time" in await fails(call)
        finally:
            running.process.send_signal(signal.SIGCONT)
        client.patience_s = PATIENCE_S  # type: ignore[attr-defined]
        if connected:
            await store.ping()


async def test_more_callers_than_connections_wait_for_their_turn(running: Running) -> None:
    async with store_at(running.url) as store:
        await asyncio.gather(*(store.ping() for _ in range(300)))
        with admin(running) as client:
            assert client.info("clients")["connected_clients"] <= 64 + 1


# Servers that are none ------------------------------------------------------------------------------------------------

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[str]:
    """Give the address of something that listens, and does so with who comes."""

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError, asyncio.IncompleteReadError):
            await serve(reader, writer)

    async with await asyncio.start_server(served, HOST, 0) as server:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}"


async def _never_answer(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    while await reader.read(4096):
        pass


async def _answer_as_a_web_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(4096)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def _answer_as_of_old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while head := await reader.readline():
        sizes_and_words = [await reader.readline() for _ in range(2 * int(head[1:]))]
        writer.write(_of_old(sizes_and_words[1].strip()))


def _of_old(command: bytes) -> bytes:
    """Return what a Redis 5 answers: it has no HELLO and no names of libraries, but it has INFO."""
    if command != b"INFO":
        return b"-ERR unknown command `%b`, with args beginning with: \r\n" % command
    about = b"# Server\r\nredis_version:5.0.14\r\nredis_mode:standalone\r\n# Replication\r\nrole:master\r\n"
    return b"$%d\r\n%b\r\n" % (len(about), about)


async def test_a_server_that_is_too_old_is_refused() -> None:
    """The only server here that is not real: none that old can be had where the tests run."""
    async with listening(_answer_as_of_old) as address:
        assert "is version 5.0.14; 6.2 or newer is needed" in await refused(f"redis://{address}")


@pytest.mark.parametrize(
    "form", ["redis://{}", "rediss://{}", "redis+cluster://{}", "redis+sentinel://{}/memories", "redis://:pw@{}"]
)
async def test_something_that_listens_and_never_answers_is_given_up(form: str) -> None:
    async with listening(_never_answer) as address:
        assert "did not answer in time" in await refused(form.format(address), timeout_s=MOMENT_S)


async def test_something_that_speaks_otherwise_is_refused() -> None:
    async with listening(_answer_as_a_web_server) as address:
        assert f"at {address}" in await refused(f"redis://{address}")
        assert "TLS" in await refused(f"rediss://{address}")


# Over TLS -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Secured:
    """A server that speaks TLS, with a certificate that it signed itself."""

    address: str
    certificate: Path
    key: Path


@contextmanager
def secured(folder: Path, *more: str) -> Iterator[Secured]:
    """Run a server that speaks nothing but TLS; Debian's Redis does, the small Valkey of the package cannot."""
    binary = BINARIES["redis"]
    if binary is None or shutil.which("openssl") is None:
        pytest.skip("no Redis server with TLS, or no openssl to make it a certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    made = ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=store", "-addext", f"subjectAltName=IP:{HOST}"]
    subprocess.run([*make, *made], check=True, capture_output=True, timeout=PATIENCE_S)
    (port,) = servers.free_ports(1)
    files = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", certificate)
    with server(str(binary), "--tls-port", str(port), "--tls-auth-clients", "no", *map(str, files), *more):
        yield Secured(address=f"{HOST}:{port}", certificate=certificate, key=key)


@pytest.mark.slow
async def test_a_certificate_is_trusted_if_its_authority_is_named_and_else_not(tmp_path: Path) -> None:
    with secured(tmp_path) as own:
        assert "certificate that is not trusted" in await refused(f"rediss://{own.address}")
        async with opened(f"rediss://{own.address}?ssl_ca_certs={own.certificate}") as client:
            await check(client)
        port = own.address.rpartition(":")[2]
        assert "another's" in await refused(f"rediss://localhost:{port}?ssl_ca_certs={own.certificate}")
        trusting = f"?ssl_ca_certs={own.certificate}&ssl_check_hostname=false"
        async with opened(f"rediss://localhost:{port}{trusting}") as client:
            await check(client)
        assert f"at {own.address} cannot be reached, or closed" in await refused(f"redis://{own.address}")


@pytest.mark.slow
async def test_a_server_may_ask_for_a_certificate_of_ours(tmp_path: Path) -> None:
    with secured(tmp_path, "--tls-auth-clients", "yes") as own:
        url = f"rediss://{own.address}?ssl_ca_certs={own.certificate}"
        # The server says so after the handshake, and closes: which of the two is seen first is a race of its own.
        told = await refused(url)
        assert "asks for a certificate of ours" in told or "closed the connection" in told
        async with opened(f"{url}&ssl_certfile={own.certificate}&ssl_keyfile={own.key}") as client:
            await check(client)


# Clusters -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(binary: str) -> Iterator[Cluster]:
    """Yield a cluster of three primaries; every test leaves it as it was."""
    with cluster(binary) as own:
        yield own


@pytest.fixture
def url(three: Cluster) -> str:
    return three.url


async def test_a_good_cluster_is_taken_and_nothing_is_left_in_it(three: Cluster, url: str) -> None:
    async with opened(url) as client:
        await check(client)
        assert [node.call("DBSIZE") for node in three.nodes] == [0, 0, 0]


async def test_a_node_of_a_cluster_is_no_store_by_itself(three: Cluster) -> None:
    alone = f"redis://{three.nodes[0].address}"
    assert "use redis+cluster://" in await refused(alone)
    async with store_at(alone) as store:
        told = [await _said(store.claim(tenant, "sweep", 1.0)) for tenant in ("a", "b", "c", "d")]
    assert any("use redis+cluster://" in one for one in told)


async def _said(call: Awaitable[Any]) -> str:
    try:
        await call
    except StoreDown as error:
        return error.detail
    return ""


async def test_a_single_server_is_no_cluster(three: Cluster, binary: str) -> None:
    with sentinel(binary, replicas=0, sentinels=1) as own:
        assert "is no cluster: use redis://" in await refused(f"redis+cluster://{own.servers[0].address}")
        assert "is a Sentinel" in await refused(f"redis://{own.sentinels[0].address}")
    assert three.living() == three.nodes


@pytest.mark.parametrize("which", range(3))
async def test_one_node_that_may_drop_what_it_holds_is_one_too_many(three: Cluster, url: str, which: int) -> None:
    node = three.nodes[which]
    node.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    assert f"at {node.address} has the maxmemory-policy allkeys-lru" in await refused(url)
    node.call("CONFIG", "SET", "maxmemory-policy", "noeviction")


async def test_one_node_that_is_full_is_one_too_many(three: Cluster, url: str) -> None:
    three.nodes[1].call("CONFIG", "SET", "maxmemory", 1)
    assert "no memory left" in await refused(url)
    three.nodes[1].call("CONFIG", "SET", "maxmemory", 0)


async def test_a_cluster_in_which_nobody_has_some_slots_is_down(three: Cluster, url: str) -> None:
    tenants = [f"zoo{number}" for number in range(20)]
    async with store_at(url) as store:
        await asyncio.gather(*(store.claim(tenant, "sweep", 60.0) for tenant in tenants))
        for node in three.nodes:
            node.call("CLUSTER", "DELSLOTS", 0)
        try:
            assert "some of its slots have no primary" in await refused(url)
            assert "some of its slots have no primary" in await fails(store.claim(tenants[0], "sweep", 60.0))
        finally:
            three.nodes[0].call("CLUSTER", "ADDSLOTS", 0)
            until("all is well", lambda: all("state:ok" in node.call("CLUSTER", "INFO") for node in three.nodes))
        assert await asyncio.gather(*(store.claim(tenant, "sweep", 60.0) for tenant in tenants)) == [False] * 20
    three.flush()


async def test_the_cluster_is_found_by_any_node_that_is_named(three: Cluster) -> None:
    async with opened(f"redis+cluster://{HOST}:1,{three.nodes[2].address}") as client:
        await check(client)


async def test_a_node_that_is_gone_is_named_at_start(three: Cluster, url: str) -> None:
    node = three.nodes[1]
    node.kill()
    try:
        assert f"at {node.address} refuses the connection" in await refused(url)
    finally:
        three.heal()


async def test_a_slot_that_moves_under_load_costs_no_call_its_answer(three: Cluster, url: str) -> None:
    """Each task counts in one key, and several share a key's slot: what is counted twice or not at all would show."""
    source = three.owner("{moving}")
    target = next(node for node in three.nodes if node is not source)
    done = {f"{{moving}}{number}": 0 for number in range(8)}
    moved = threading.Event()

    async def count(client: Redis, key: str) -> None:
        since = None
        while since is None or done[key] <= since:
            since = done[key] if since is None and moved.is_set() else since
            done[key] += 1
            assert await client.incr(key) == done[key]
            batch = client.pipeline(transaction=False)
            assert await batch.get(key).get("elsewhere").execute() == [str(done[key]).encode(), None]

    def move() -> None:
        for stage in three.move_key_by_key("{moving}", target):
            before = dict(done)
            # One call of each task began after this stage was reached, and ended.
            until(f"calls met: {stage}", lambda before=before: all(done[key] > before[key] + 1 for key in done))
        moved.set()

    async with opened(url) as client:
        tasks = [asyncio.create_task(count(client, key)) for key in done]
        await asyncio.to_thread(move)
        await asyncio.gather(*tasks)
        assert min(done.values()) > 1
        assert three.owner("{moving}") is target
        await client.flushall()


async def test_a_cluster_works_without_a_replica_that_is_away(binary: str) -> None:
    with cluster(binary, primaries=1, replicas=1) as own:
        async with opened(own.url) as client:
            await check(client)
            primary = own.owner("any")
            replica = own.replica_of(primary)
            # A replica is listed once it has something of its primary's: what the check left behind.
            until("the replica is listed", lambda: len(primary.call("CLUSTER", "SLOTS")[0]) == 4)
            replica.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
            assert f"at {replica.address} has the maxmemory-policy" in await refused(own.url)
            replica.kill()
            await check(client)


# Sentinels ------------------------------------------------------------------------------------------------------------


async def test_a_primary_is_found_by_its_sentinels_with_its_password_and_theirs(binary: str) -> None:
    with sentinel(binary, replicas=0, sentinels=1) as own:
        (primary,), (watcher,) = own.servers, own.sentinels
        async with opened(own.url) as client:
            await check(client)
        assert "know no primary of this name" in await refused(own.url + "x")
        watcher.call("SENTINEL", "SET", SERVICE, "auth-pass", PASSWORD)
        primary.call("CONFIG", "SET", "requirepass", PASSWORD)
        assert "asks for a password" in await refused(own.url)
        assert "refuses the user or the password" in await refused(own.url.replace("://", "://:wrong@"))
        entered = own.url.replace("://", f"://:{QUOTED}@")
        async with opened(entered) as client:
            await check(client)
        watcher.call("ACL", "SETUSER", "default", "resetpass", f">{PASSWORD}2")
        assert "its Sentinels refuse" in await refused(entered)
        async with opened(f"{entered}?sentinel_password={QUOTED}2") as client:
            await check(client)


async def test_after_a_failover_calls_go_to_the_new_primary(binary: str) -> None:
    with sentinel(binary, down_after_ms=30_000) as own:
        old = own.owner()
        async with store_at(own.url) as store, opened(own.url) as client:
            await store.claim("zoo", "sweep", 60.0)
            pool: Any = client.connection_pool
            connection = await pool.get_connection()
            named = f":{old.port}'"

            def agreed() -> bool:
                left = [one for one in own.sentinels if named in one.info("sentinel")["master0"]]
                if own.sentinels[0] in left:  # one that is slow gives a failover up
                    own.sentinels[0].call("SENTINEL", "FAILOVER", SERVICE)
                return not left

            until("they agree", agreed)
            old.kill()
            await connection.disconnect()  # as an error does in the middle of a call, which is then tried again
            await connection.send_command("ROLE")
            assert (await connection.read_response())[0] == b"master"
            await pool.release(connection)
            assert not await store.claim("zoo", "sweep", 60.0)
            own.sentinels[0].kill()
            await check(client)


# The command ----------------------------------------------------------------------------------------------------------


async def serve(store: str) -> str:
    """Return the line with which `dmn serve` refuses a store. Its encoder cannot be had, and must not be asked for."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DMN_")}
    started = await asyncio.create_subprocess_exec(
        *(str(DMN), "serve", "--port", "0", "--store", store),
        cwd=ROOT,
        env={**clean, "DMN_ENCODER": "ViT-B-16@nowhere.safetensors"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(started.communicate(), PATIENCE_S)
    assert started.returncode == 2
    assert not out
    (line,) = err.decode().splitlines()
    assert line.startswith("dmn: ")
    assert "nowhere" not in line
    assert PASSWORD not in line
    assert QUOTED not in line
    return line


@pytest.mark.slow
@pytest.mark.skipif(not any(BINARIES.values()), reason="no Valkey or Redis server is installed")
async def test_the_command_refuses_an_unfit_server_in_one_line_before_the_encoder_is_loaded() -> None:
    with server(next(str(binary) for binary in BINARIES.values() if binary), "--requirepass", PASSWORD) as own:
        assert "refuses the user or the password" in await serve(with_login(own, ":wrong"))


async def test_a_call_that_is_cancelled_at_any_moment_ends_and_leaves_its_connection_in_order(
    running: Running,
) -> None:
    """Deadlines and orderly stops stand on it."""
    async with opened(running.url) as client:
        for number in range(200):
            asked = asyncio.create_task(client.echo(f"{number}"))
            for _ in range(number % 8):
                await asyncio.sleep(0)
            if asked.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await asked
            assert await client.echo(f"after {number}") == f"after {number}".encode()
