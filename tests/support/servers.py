"""Real servers for tests: Valkey or Redis processes, alone, as a cluster or under sentinels; none outlives its test."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from service.stores.embedded.binary import find_binary
from tests.support.process import until

BINARIES = {"valkey": find_binary(), "redis": shutil.which("redis-server")}
"""Real servers: the one that the embedded store runs, and Debian's Redis where it is."""

PATIENCE_S = 60.0

HOST = "127.0.0.1"
SLOTS = 16384
"""Hash slots of a cluster."""

_PORTS = range(10_000 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8, 32_000, 8)
"""Below those that the system gives to clients, and for this worker alone: a port stays free while nobody listens."""

_LAUNCHES = 5

_GUARD = """
import os, shutil, signal, sys
folder = sys.argv[1]
sys.stdin.read()
for pid in filter(str.isdigit, os.listdir('/proc') if os.path.isdir('/proc') else ()):
    try:
        if os.readlink(f'/proc/{pid}/cwd').startswith(folder):
            os.kill(int(pid), signal.SIGKILL)
    except OSError:
        continue
shutil.rmtree(folder, ignore_errors=True)
"""
"""Waits until its parent is gone, however that ended, and then ends whoever still lives in a folder."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that listens on a socket in a folder of its own."""

    process: subprocess.Popen[bytes]
    folder: Path
    socket: Path

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"


@contextmanager
def server(binary: str, *more: str) -> Iterator[Running]:
    """Run a server until the block ends; `more` are options such as `--requirepass`, `secret`."""
    with _folder() as folder:
        name, listening = str(folder), folder / "s.sock"
        arguments = ("--port", "0", "--unixsocket", str(listening), "--save", "", "--dir", name, *more)
        command = (binary, *arguments)
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log, cwd=name) as own,
        ):
            try:
                wait_until_listening(own, listening)
                yield Running(process=own, folder=folder, socket=listening)
            finally:
                own.terminate()
                own.wait(PATIENCE_S)


@contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder for servers to live in, who end with it: also when this process is killed."""
    with TemporaryDirectory(prefix="dmn-", ignore_cleanup_errors=True) as name:
        command = (sys.executable, "-I", "-S", "-c", _GUARD, name)
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
            yield Path(name)


def wait_until_listening(process: subprocess.Popen[bytes], path: Path) -> None:
    ends = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError), closing(socket.socket(socket.AF_UNIX)) as probe:
            probe.connect(str(path))
            return
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < ends, "the server does not listen"
        time.sleep(0.02)  # no event tells that another process listens; bounded above


# Servers on ports -----------------------------------------------------------------------------------------------------


class PortTaken(Exception):
    """Someone else was faster: the server could not listen."""


@dataclass(kw_only=True, eq=False)
class Node:
    """A server on a port of this machine; it may be killed, held, and started again on what it left."""

    command: tuple[str, ...]
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    lives: int = 0
    held: bool = False

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def call(self, *command: str | bytes | int) -> Any:
        """Return what the server answers to one command, as text."""
        with client_of(self.port) as client:
            return client.execute_command(*command)

    def info(self, section: str) -> dict[str, str]:
        """Return a section of what the server says of itself."""
        with client_of(self.port) as client:
            return {name: str(value) for name, value in client.info(section).items()}

    def start(self) -> None:
        """Run the server and return once it answers.

        Raises:
            PortTaken: it ended, as one does that cannot listen.
        """
        self.lives += 1
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.folder)
        until(f"the server on {self.address} answers", self._answers)

    def kill(self) -> None:
        """End the server as a power cut would, and return once it is gone."""
        self._send(signal.SIGKILL)

    def hold(self) -> None:
        """Stop the server as it stands: its connections stay open and nothing answers."""
        self.held = True
        self._send(signal.SIGSTOP)

    def release(self) -> None:
        """Let a server go on that was held."""
        self.held = False
        self._send(signal.SIGCONT)

    def _send(self, what: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(what)
            if what is signal.SIGKILL:
                self.process.wait(PATIENCE_S)

    def _answers(self) -> bool:
        if not self.alive:
            raise PortTaken((self.folder / "log").read_text(errors="replace")[-500:])
        return bool(self.call("PING"))


def client_of(port: int) -> Redis:
    """Return a client of one server that neither waits for long nor tries again."""
    return Redis(host=HOST, port=port, decode_responses=True, socket_timeout=5.0, retry=Retry(NoBackoff(), 0))


@contextmanager
def _nodes(launch: Callable[[Path, Sequence[int]], list[Node]], ports: int) -> Iterator[list[Node]]:
    """Run servers that `launch` makes of a folder and so many free ports; others may take a port first: try again."""
    with ExitStack() as stack:
        for last in [False] * (_LAUNCHES - 1) + [True]:
            nodes = launch(stack.enter_context(_folder()), free_ports(ports))
            stack.callback(_end, nodes)
            try:
                for node in nodes:
                    node.start()
            except PortTaken:
                _end(nodes)
                if last:
                    raise
            else:
                break
        yield nodes


def _end(nodes: Sequence[Node]) -> None:
    for node in nodes:
        node.kill()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            probe = stack.enter_context(closing(socket.socket()))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, random.SystemRandom().choice(_PORTS)))
                found.append(probe.getsockname()[1])
    return found


def _node(folder: Path, port: int, binary: str, *more: str) -> Node:
    own = folder / str(port)
    own.mkdir()
    listens = ("--port", str(port), "--bind", HOST, "--dir", str(own), "--save", "", "--repl-diskless-sync-delay", "0")
    return Node(command=(binary, *listens, *more), folder=own, port=port)


# A cluster ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Member:
    """A node as another one sees it: its id, whether it takes writes, whose replica it is, and its slots."""

    node: Node
    id: str
    primary: bool
    failed: bool
    replica_of: str
    slots: tuple[range, ...]


@dataclass(kw_only=True, eq=False)
class Cluster:
    """A cluster of servers on this machine."""

    nodes: list[Node]
    _known: dict[int, Node] = field(init=False)

    def __post_init__(self) -> None:
        self._known = {node.port: node for node in self.nodes}

    @property
    def url(self) -> str:
        """What a client connects to: one node, by which it finds the others."""
        return f"redis+cluster://{self.living()[0].address}"

    @property
    def urls(self) -> str:
        """The same with all nodes: one of them is there, whatever is killed."""
        return f"redis+cluster://{','.join(node.address for node in self.nodes)}"

    def living(self) -> list[Node]:
        """Return the nodes that answer."""
        return [node for node in self.nodes if node.alive and not node.held]

    def flush(self) -> None:
        """Empty all primaries."""
        for member in self.members():
            if member.primary:
                member.node.call("FLUSHALL")

    def members(self, seen_by: Node | None = None) -> list[Member]:
        """Return all nodes as one of them sees them."""
        text = str((seen_by or self.living()[0]).call("CLUSTER", "NODES"))
        return [self._member(line.split()) for line in text.splitlines()]

    def owner(self, key: str, seen_by: Node | None = None) -> Node:
        """Return the primary that has a key's slot.

        Raises:
            LookupError: nobody has, as long as a dead one was not replaced.
        """
        slot = key_slot(key.encode())
        owners = [one.node for one in self.members(seen_by) if one.primary and any(slot in part for part in one.slots)]
        if not owners:
            raise LookupError(f"nobody owns slot {slot}")
        return owners[0]

    def replica_of(self, primary: Node) -> Node:
        """Return the replica of a primary."""
        members = self.members()
        own = next(member.id for member in members if member.node is primary)
        return next(member.node for member in members if member.replica_of == own)

    def id_of(self, node: Node) -> str:
        """Return a node's id."""
        return str(node.call("CLUSTER", "MYID"))

    def keys_in(self, node: Node, key: str) -> int:
        """Return how many keys a node has in the slot of a key."""
        return int(node.call("CLUSTER", "COUNTKEYSINSLOT", key_slot(key.encode())))

    def heal(self) -> None:
        """Start what was killed, let go on what was held, and return once all is well: every link and every slot."""
        for node in self.nodes:
            node.release()
            if not node.alive:
                node.start()
        until("the cluster is whole", self._whole)

    def move_key_by_key(self, key: str, target: Node) -> Iterator[str]:
        """Move a key's slot in the classic way, and yield after each step what was done."""
        slot, source = key_slot(key.encode()), self.owner(key)
        target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(target))
        yield "opened"
        while found := source.call("CLUSTER", "GETKEYSINSLOT", slot, 1):
            source.call("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *found)
            yield f"moved {found[0]}"
        primaries = [member.node for member in self.members() if member.primary]
        for node in (target, source, *primaries):
            node.call("CLUSTER", "SETSLOT", slot, "NODE", self.id_of(target))
        yield "closed"

    def move_at_once(self, key: str, target: Node) -> None:
        """Start to move a key's slot in the atomic way, which the server goes on with by itself."""
        slot = key_slot(key.encode())
        self.owner(key).call("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", self.id_of(target))

    def moves_at_once(self) -> bool:
        """Return whether the servers know the atomic way."""
        told = self.nodes[0].call("CLUSTER", "HELP")
        return any(line.startswith("MIGRATESLOTS") for line in told)

    def _member(self, words: Sequence[str]) -> Member:
        id_, address, flags, of = words[:4]
        known = self._known[int(address.partition("@")[0].rpartition(":")[2])]
        spans = [word.split("-") for word in words[8:] if not word.startswith("[")]
        return Member(
            node=known,
            id=id_,
            primary="master" in flags.split(",") and "fail" not in flags.split(","),
            failed="fail" in flags,
            replica_of="" if of == "-" else of,
            slots=tuple(range(int(span[0]), int(span[-1]) + 1) for span in spans),
        )

    def _whole(self) -> bool:
        """Return whether every node sees the same, nobody failed, and every replica has what its primary has."""
        views = [[(one.id, one.primary, one.replica_of, one.slots) for one in self.members(by)] for by in self.nodes]
        states = [node.call("CLUSTER", "INFO") for node in self.nodes]
        roles = [node.info("replication") for node in self.nodes]
        return (
            all(sorted(view) == sorted(views[0]) for view in views)
            and not any(one.failed for by in self.nodes for one in self.members(by))
            and all("cluster_state:ok" in state for state in states)
            and all(role["role"] == "master" or role["master_link_status"] == "up" for role in roles)
            and sum(len(part) for one in self.members() for part in one.slots) == SLOTS
        )


@contextmanager
def cluster(
    binary: str, *, primaries: int = 3, replicas: int = 0, node_timeout_ms: int = 15_000, more: Sequence[str] = ()
) -> Iterator[Cluster]:
    """Run a cluster until the block ends, each primary with so many replicas; `more` are options of every node.

    The timeout is how long a node may be silent before the others call it dead: short where one is to die.
    """
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms), *more)
    size = primaries * (1 + replicas)

    def launch(folder: Path, ports: Sequence[int]) -> list[Node]:
        pairs = zip(ports[:size], ports[size:], strict=True)
        return [_node(folder, port, binary, *options, "--cluster-port", str(bus)) for port, bus in pairs]

    with _nodes(launch, 2 * size) as nodes:
        whole = Cluster(nodes=nodes)
        _form(whole, primaries)
        yield whole


def _form(whole: Cluster, primaries: int) -> None:
    """Make one cluster of nodes that do not know each other; those after the primaries become their replicas."""
    nodes = whole.nodes
    for number, node in enumerate(nodes):
        node.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        if number < primaries:
            first, after = (SLOTS * at // primaries for at in (number, number + 1))
            node.call("CLUSTER", "ADDSLOTSRANGE", first, after - 1)
    for one in nodes:
        for other in nodes:
            if other is not one:
                bus = one.command[one.command.index("--cluster-port") + 1]
                other.call("CLUSTER", "MEET", HOST, one.port, bus)
    until("all have met", lambda: all(_has_met(node, len(nodes)) for node in nodes))
    for number, node in enumerate(nodes[primaries:]):
        node.call("CLUSTER", "REPLICATE", whole.id_of(nodes[number % primaries]))
    until("the cluster is whole", whole._whole)


def _has_met(node: Node, others: int) -> bool:
    lines = str(node.call("CLUSTER", "NODES")).splitlines()
    return len(lines) == others and not any("handshake" in line or "noaddr" in line for line in lines)


# Sentinels ------------------------------------------------------------------------------------------------------------

SERVICE = "memories"
"""What the sentinels call the primary that they watch."""


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """A primary and its replicas under sentinels."""

    servers: list[Node]
    sentinels: list[Node]

    @property
    def url(self) -> str:
        """What a client connects to: the sentinels, and the name of what they watch."""
        return f"redis+sentinel://{','.join(one.address for one in self.sentinels)}/{SERVICE}"

    @property
    def urls(self) -> str:
        """The same: it names all sentinels."""
        return self.url

    def owner(self, _key: str = "") -> Node:
        """Return the primary that the sentinels name now; it has every key."""
        _, port = next(one for one in self.sentinels if one.alive).call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        return next(node for node in self.servers if node.port == int(port))

    def _ready(self) -> bool:
        linked = all(node.info("replication")["master_link_status"] == "up" for node in self.servers[1:])
        return linked and all(self._sees_all(sentinel) for sentinel in self.sentinels)

    def _sees_all(self, sentinel: Node) -> bool:
        # Raises where too few others answer to agree that the primary is down, or to choose who acts on it.
        sentinel.call("SENTINEL", "CKQUORUM", SERVICE)
        others, known = (sentinel.call("SENTINEL", what, SERVICE) for what in ("SENTINELS", "REPLICAS"))
        return len(others) == len(self.sentinels) - 1 and len(known) == len(self.servers) - 1


@contextmanager
def sentinel(binary: str, *, replicas: int = 1, sentinels: int = 3, down_after_ms: int = 1000) -> Iterator[Guarded]:
    """Run a primary with replicas under sentinels until the block ends; most of the sentinels have to agree."""
    size = 1 + replicas

    def launch(folder: Path, ports: Sequence[int]) -> list[Node]:
        main = ports[0]
        first = [_node(folder, main, binary)]
        others = [_node(folder, port, binary, "--replicaof", f"{HOST} {main}") for port in ports[1:size]]
        told = (
            f"monitor {SERVICE} {HOST} {main} {sentinels // 2 + 1}",
            f"down-after-milliseconds {SERVICE} {down_after_ms}",
            f"failover-timeout {SERVICE} 10000",
        )
        return first + others + [_sentinel(folder, port, binary, told) for port in ports[size:]]

    with _nodes(launch, size + sentinels) as nodes:
        guarded = Guarded(servers=nodes[:size], sentinels=nodes[size:])
        until("the sentinels see each other, the primary and its replicas", guarded._ready)
        yield guarded


def _sentinel(folder: Path, port: int, binary: str, told: Sequence[str]) -> Node:
    own = folder / str(port)
    own.mkdir()
    config = own / "sentinel.conf"
    lines = (f"port {port}", f"bind {HOST}", f"dir {own}", *(f"sentinel {line}" for line in told))
    config.write_text("\n".join(lines) + "\n")
    return Node(command=(binary, str(config), "--sentinel"), folder=own, port=port)
