"""The service in several processes, on a real port: it answers as one does, and outlives any of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.testclient import TestClient

from core.encoders import openclip
from service.app import create_app
from service.settings import Settings
from service.stores.embedded.binary import find_binary
from tests.support.fakes import FakeEncoder, picture
from tests.support.process import PATIENCE_S, Command, servers_of

pytestmark = pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed")

CLASSES = ("red", "green", "blue")
TENANTS = ("ant", "bee", "cat", "dog")
HEAD = (
    b"POST /classify HTTP/1.1\r\nHost: here\r\nX-Tenant: ant\r\nContent-Type: image/png\r\n"
    b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n"
)
"""The head of a call whose body the service asks for once it reads it."""


class Service:
    """A running service and its processes, as its log tells of them; what it leaves behind is looked for in `tmp`."""

    def __init__(self, command: Command, tmp: Path) -> None:
        self.command, self.tmp, self.data = command, tmp / "tmp", tmp / "data"
        self.url = command.url()

    def pids(self, role: str) -> list[int]:
        """Return the processes of a role, the latest of each name."""
        found = {one["process"]: one["pid"] for one in self.events("dmn.process.started")}
        return [pid for name, pid in found.items() if name.startswith(role)]

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.command.err if line.startswith("{")]
        return [one for one in lines if one["event"] == name]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False)

    def get(self, path: str, **headers: str) -> httpx.Response:
        with self.client() as own:
            return own.get(path, headers=headers)

    def metrics(self) -> dict[str, float]:
        text = self.get("/metrics").text
        return {name: float(value) for name, value in re.findall(r"^(dmn_\S+) (\S+)$", text, re.MULTILINE)}

    def all_there(self) -> bool:
        """Return whether every process is, as readiness has it."""
        told = self.get("/readyz").json()
        return bool(told["ready"]) and len(set(told["checks"]["workers"]["detail"].split(" of "))) == 1


@contextmanager
def service(tmp: Path, *, fronts: int = 2, devices: str = "cpu,cpu", **more: str) -> Iterator[Service]:
    (tmp / "tmp").mkdir()
    places = {"DMN_DATA_DIR": str(tmp / "data"), "TMPDIR": str(tmp / "tmp")}
    options = ("--http-workers", str(fronts), "--devices", devices)
    with Command("fake", "serve", "--port", "0", *options, store="embedded", **places, **more) as command:
        yield Service(command, tmp)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two HTTP processes before one worker process."""
    with service(tmp_path_factory.mktemp("small"), devices="cpu") as own:
        yield own


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two HTTP processes before two worker processes."""
    with service(tmp_path_factory.mktemp("house")) as own:
        yield own


def until(told: Callable[[], bool]) -> None:
    """Ask until it is so; every question takes its time."""
    ends = time.monotonic() + PATIENCE_S
    while not _true(told):
        assert time.monotonic() < ends


def _true(told: Callable[[], bool]) -> bool:
    with suppress(httpx.HTTPError):
        return told()
    return False


def alive(pid: int) -> bool:
    """Return whether a process runs; one that only waits for its parent to see its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def lets_in(url: str) -> bool:
    """Return whether somebody listens there."""
    at = urlsplit(url)
    try:
        socket.create_connection((at.hostname, at.port)).close()
    except (ConnectionRefusedError, ConnectionResetError):  # the latter who knocked as the door closed
        return False
    return True


def configure(client: httpx.Client, tenant: str, **more: Any) -> None:
    body = {"classes": list(CLASSES), "slots": 256} | more
    assert client.put(f"/tenants/{tenant}", json=body).status_code in {200, 201}


def post(client: httpx.Client, tenant: str, *images: bytes, **query: Any) -> httpx.Response:
    files = [("images", (f"{i}.png", image, "image/png")) for i, image in enumerate(images)]
    return client.post("/classify", files=files, params=query, headers={"X-Tenant": tenant})


class Load:
    """Clients that post pictures, one after the other, until told to stop; what was answered is written down."""

    def __init__(self, house: Service, clients: int = 4) -> None:
        self._house, self._stop = house, threading.Event()
        self.statuses: Counter[int | str] = Counter()
        self.learned: list[tuple[str, str, str]] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a call hangs"

    @property
    def answered(self) -> int:
        return self.statuses[200]

    def _run(self, number: int) -> None:
        tenant, client = TENANTS[number % len(TENANTS)], self._house.client()
        for seed in range(240):
            if self._stop.is_set():
                break
            try:
                answer = post(client, tenant, picture(CLASSES[seed % 3], 1000 * number + seed))
            except httpx.HTTPError as error:
                client.close()
                client = self._house.client()
                self._note(type(error).__name__)
                if isinstance(error, httpx.ConnectError):
                    break
            else:
                self._note(answer.status_code)
                if answer.status_code == 200:
                    learned = answer.json()["predictions"][0]["learned"]
                    self.learned.append((tenant, learned["label"], learned["slot"]))
        client.close()

    def _note(self, what: int | str) -> None:
        with self._lock:
            self.statuses[what] += 1


def slots(client: httpx.Client, tenant: str) -> set[tuple[str, str, str]]:
    """Return what a tenant's memory holds."""
    found = set()
    for name in CLASSES:
        items = client.get(f"/memory/dynamic/{name}", params={"limit": 1000}, headers={"X-Tenant": tenant}).json()
        found |= {(tenant, name, one["slot"]) for one in items["items"]}
    return found


def assert_nothing_is_lost(house: Service, load: Load) -> None:
    with house.client() as client:
        held = set().union(*(slots(client, tenant) for tenant in TENANTS))
    assert load.learned
    assert set(load.learned) <= held


def prepared(house: Service) -> None:
    with house.client() as client:
        for tenant in TENANTS:
            client.delete(f"/tenants/{tenant}")
            configure(client, tenant)


# One visit, told alike ------------------------------------------------------------------------------------------------


def visit(client: httpx.Client) -> list[tuple[int, Any]]:
    """Do a bit of everything for several tenants, and return what was told, without what is new each time."""
    told = []
    for tenant in TENANTS:
        named = {"X-Tenant": tenant}
        images = [picture(name, seed) for name in CLASSES for seed in range(2)]
        shot = {"images": ("a.png", picture("red", 9), "image/png")}
        answers = [
            post(client, tenant, images[0]),
            client.put(f"/tenants/{tenant}", json={"classes": ["red", "green"], "method": "dmn"}),
            client.post(f"/tenants/{tenant}/classes", json={"classes": ["blue"]}),
            post(client, tenant, *images, b"no image", top_k=2),
            post(client, tenant, images[0], explain=True, learn=False),
            post(client, tenant, b"no image"),
            post(client, tenant, images[1], views=3),
            post(client, tenant, images[0], views=1000),
            client.post(
                "/classify", content=images[2], headers={**named, "Content-Type": "image/png"}, params={"x": 1}
            ),
            client.post("/classify", json={"images": [{"data": "?"}]}, headers=named),
            client.post("/memory/static", data={"label": "red"}, files=shot, headers=named),
            client.get("/memory/static", headers=named),
            client.get("/memory", headers=named),
            client.get("/memory/dynamic/blue", headers=named),
            client.post("/admin/memory/reset", json={"scope": "static"}, headers=named),
            client.get("/admin/memory/export", headers=named),
            client.get(f"/tenants/{tenant}"),
            client.delete("/tenants/nobody"),
            client.get("/nowhere"),
            client.put("/classify"),
            client.get("/problems/queue-full"),
        ]
        told += [(answer.status_code, _lasting(answer)) for answer in answers]
    return told


_NEW = re.compile(r'"(request_id|id|snapshot|created|bytes|at)":\s*("[^"]*"|[0-9.]+)|-?[0-9]+\.[0-9]+(e-?[0-9]+)?')


def _lasting(answer: httpx.Response) -> str:
    """Return what an answer says but for ids and the last digits of numbers."""
    if not answer.headers["content-type"].startswith(("application/json", "application/problem+json")):
        return answer.headers["content-type"]
    return _NEW.sub(lambda found: found[1] or f"{float(found[0]):.3f}", answer.text)


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, Any]]:
    """Return what one process tells, without a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openclip, "load", lambda *_, **__: FakeEncoder())
        with TestClient(create_app(Settings(store="memory", device="cpu", encoder="fake"))) as client:
            return visit(client)


def test_two_worker_processes_answer_as_one_process_does(house: Service, expected: list[tuple[int, Any]]) -> None:
    with house.client() as client:
        assert visit(client) == expected


def test_one_worker_process_answers_as_one_process_does(small: Service, expected: list[tuple[int, Any]]) -> None:
    with small.client() as client:
        assert visit(client) == expected


# One service, whoever is asked ----------------------------------------------------------------------------------------


def test_metrics_add_up_over_processes_whichever_is_asked(house: Service) -> None:
    prepared(house)
    before = house.metrics()
    images = [picture(name, seed) for name in CLASSES for seed in range(4)]
    for tenant in TENANTS:
        for _ in range(3):
            with house.client() as client:  # a connection of its own: any HTTP process may take it
                assert post(client, tenant, *images, b"no image").status_code == 200
    counted = 'dmn_requests_total{code="200",method="POST",route="/classify"}'
    until(lambda: house.metrics()[counted] - before.get(counted, 0.0) >= 3 * len(TENANTS))
    until(lambda: house.metrics()["dmn_inflight_images"] == 0)
    for _ in range(4):
        after = house.metrics()
        grown = {name: after[name] - before.get(name, 0.0) for name in after}
        assert grown[counted] == 3 * len(TENANTS)
        assert grown['dmn_image_errors_total{reason="image-unreadable"}'] == 3 * len(TENANTS)
        assert sum(grown[f'dmn_memory_updates_total{{outcome="{name}"}}'] for name in ("filled", "duplicate")) == (
            3 * len(TENANTS) * len(images)
        )
        assert grown["dmn_batch_images_sum"] == 3 * len(TENANTS) * len(images)
        assert after["dmn_inflight_images"] == after["dmn_queue_images"] == 0
        assert after["dmn_hot_tenants"] >= len(TENANTS)
        assert after['dmn_build_info{encoder="fake",fingerprint="fake-1",version="0.1.0"}'] == 1


def test_a_tenant_is_hot_in_one_worker_process_alone(house: Service) -> None:
    prepared(house)
    for tenant in TENANTS * 4:
        with house.client() as client:
            assert post(client, tenant, picture("red", 1)).status_code == 200
    until(lambda: {one["tenant"] for one in house.events("dmn.memory.loaded")} >= set(TENANTS))
    loaded: dict[str, set[str]] = {tenant: set() for tenant in TENANTS}
    for one in house.events("dmn.memory.loaded"):
        loaded[one["tenant"]].add(one["process"])
    assert [len(loaded[tenant]) for tenant in TENANTS] == [1] * len(TENANTS)
    assert set.union(*loaded.values()) == {"back-0", "back-1"}


def test_a_request_keeps_its_id_through_all_processes(house: Service) -> None:
    for path in ("/memory", "/livez", "/nowhere"):
        assert house.get(path, **{"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    with house.client() as client:
        answer = client.post(
            "/classify", content=b"no", headers={"Content-Type": "image/png", "X-Request-ID": "mine-2"}
        )
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine-2"


# Killed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["front", "back"])
def test_a_process_that_is_killed_takes_its_own_calls_with_it_and_comes_back(house: Service, role: str) -> None:
    prepared(house)
    before, counted = house.pids(role), house.metrics()
    with Load(house) as load:
        until(lambda: load.answered > 40)
        os.kill(before[0], signal.SIGKILL)
        since = load.answered
        until(lambda: load.answered > since + 40)
        until(lambda: len(set(house.pids(role)) - {before[0]}) == 2 and house.all_there())
    assert house.pids(role)[0] != before[0]
    assert house.pids(role)[1] == before[1]
    assert set(load.statuses) <= {200, 503, "ReadError", "RemoteProtocolError", "ConnectError"}
    assert sum(load.statuses[what] for what in load.statuses if what != 200) <= 8
    if role == "back":
        assert set(load.statuses) <= {200, 503}
    assert_nothing_is_lost(house, load)
    after = house.metrics()
    assert all(after[name] >= counted[name] for name in counted if name.partition("{")[0].endswith("_total"))
    until(lambda: house.metrics()["dmn_inflight_images"] == 0)
    assert house.events("dmn.process.ended")[-1]["status"] == -signal.SIGKILL


def test_whose_worker_process_is_away_is_told_when_to_come_again(small: Service) -> None:
    prepared(small)
    small.command.signal(signal.SIGSTOP)  # it starts nothing anew until it is continued
    os.kill(small.pids("back")[0], signal.SIGKILL)
    with small.client() as client:
        for call in (lambda: post(client, "ant", picture()), lambda: client.get("/memory")):
            answer = call()
            assert (answer.status_code, answer.json()["type"]) == (503, "/problems/queue-full")
            assert answer.headers["retry-after"].isdigit()
        assert client.get("/livez").status_code == 200
        told = client.get("/readyz")
        assert (told.status_code, told.json()["checks"]["workers"]) == (503, {"ok": False, "detail": "0 of 1"})
    small.command.signal(signal.SIGCONT)
    until(small.all_there)
    with small.client() as client:
        assert post(client, "ant", picture()).status_code == 200


# Refused --------------------------------------------------------------------------------------------------------------


def refused(*options: str, **environment: str) -> str:
    """Return the one line with which the command refuses to serve."""
    with Command("lite", "serve", "--port", "0", "--http-workers", "1", *options, **environment) as command:
        assert command.ended() == 2
        lines = [line for line in command.err if line.strip() and not line.startswith("{")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("dmn: ")
        assert not command.out
    return lines[0]


def test_a_port_in_use_is_refused_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("--port", str(port))
    assert str(port) in said
    assert "in use" in said


def test_a_second_service_cannot_share_the_port_of_the_first(small: Service) -> None:
    assert "in use" in refused("--port", small.url.rpartition(":")[2])


def test_memories_in_one_process_are_refused_with_two_worker_processes() -> None:
    assert "DMN_STORE=memory" in refused("--devices", "cpu,cpu", "--store", "memory")


def test_devices_in_one_process_are_refused() -> None:
    assert "DMN_HTTP_WORKERS" in refused("--devices", "cpu", "--http-workers", "0")


def test_a_device_that_is_not_there_is_refused_with_one_line(tmp_path: Path) -> None:
    assert "cuda:99" in refused("--devices", "cpu,cuda:99", "--store", "embedded", DMN_DATA_DIR=str(tmp_path))


# Told to stop, which ends what the tests above share ------------------------------------------------------------------


def test_told_to_stop_it_answers_what_was_accepted_and_leaves_nothing_behind(small: Service) -> None:
    """Half of a body is there when it is told to stop, the other half comes when nobody is let in."""
    prepared(small)
    pids = [*small.pids("front"), *small.pids("back")]
    at, data = urlsplit(small.url), picture()
    with socket.create_connection((at.hostname, at.port), PATIENCE_S) as caller:
        caller.sendall(HEAD % len(data))
        assert caller.recv(1 << 16).startswith(b"HTTP/1.1 100 ")  # it reads the body
        caller.sendall(data[: len(data) // 2])
        small.command.signal(signal.SIGTERM)
        until(lambda: not lets_in(small.url))
        caller.sendall(data[len(data) // 2 :])
        told = b"".join(iter(lambda: caller.recv(1 << 16), b""))
    assert told.startswith(b"HTTP/1.1 200 "), told
    assert b"connection: close" in told
    assert small.command.ended() == 0
    assert not any(alive(pid) for pid in pids)
    assert not list(small.tmp.iterdir())
    assert "Traceback" not in "".join(small.command.err)
    assert {one["process"] for one in small.events("dmn.service.stopped")} == {"back-0"}
    until(lambda: not servers_of(small.data))


def test_processes_end_by_themselves_when_the_one_that_started_them_is_killed(house: Service) -> None:
    prepared(house)
    pids = [*house.pids("front"), *house.pids("back")]
    assert all(alive(pid) for pid in pids)
    house.command.process.kill()
    until(lambda: not any(alive(pid) for pid in pids))
    assert not list(house.tmp.iterdir())
    until(lambda: not servers_of(house.data))
