"""A front and the backs behind it, in this one process with real sockets between: what crosses, and who is missed.

`tests/e2e/test_processes.py` has them apart.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from service.access.api_keys import hash_of, new_key
from service.domain.records import StoredKey
from service.errors import StoreDown
from service.images.decode import Developed
from service.inference import decode_pool
from service.multiprocess import frontend as front_module
from service.multiprocess import worker_client
from service.multiprocess.frontend import Front
from service.multiprocess.ipc import Line
from service.multiprocess.worker import serving
from service.services import Rooms
from service.settings import Settings
from service.stores.in_process import InProcessStore
from service.telemetry.metrics import Metrics
from service.wiring import open_rooms
from tests.support.fakes import FakeEncoder, picture
from tests.support.house import PATIENCE_S, UNHURRIED, GatedEncoder, House, RawCall, SoftEncoder, problem, soon, until
from tests.support.replicas import without_housekeeper

RED, GREEN, BLUE = (picture(name, 1) for name in ("red", "green", "blue"))
PNG = [(b"content-type", b"image/png")]
IMAGE = {"Content-Type": "image/png"}


class Street:
    """A front, its client, and the rooms of each back; a back may go and come again."""

    def __init__(self, front: Front, client: httpx.AsyncClient, backs: list[Rooms], paths: list[str]) -> None:
        self.front, self.client, self.backs, self._paths = front, client, backs, paths
        self.house = House(client=client, app=front, rooms=backs[0])  # type: ignore[arg-type]
        self._there: dict[int, AsyncExitStack] = {}

    async def come(self, at: int) -> None:
        """Let a back be there."""
        self._there[at] = AsyncExitStack()
        await self._there[at].enter_async_context(serving(self.backs[at], self._paths[at]))
        await until(lambda: self.front._windows[at].open)

    async def go(self, at: int) -> None:
        """Let a back be gone, whatever it has in hand."""
        await self._there.pop(at).aclose()
        await until(lambda: not self.front._windows[at].open)
        self.backs[at].batcher.draining = False  # for when it comes again

    async def empty(self) -> None:
        for at in list(self._there):
            await self.go(at)

    @property
    def taken(self) -> list[int]:
        """Images in each back."""
        return [rooms.batcher.taken for rooms in self.backs]


@asynccontextmanager
async def street(*encoders: SoftEncoder, **more: Any) -> AsyncIterator[Street]:
    """Open a front and a back for each encoder, each with memories of its own, which shows who answered."""
    given = {"decode_workers": 2, "store": "memory", "http_workers": 1, "drain_timeout_s": 0.01}
    settings = Settings(**(given | UNHURRIED | more))
    async with AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(front_module, "_PROBE_S", PATIENCE_S)
        patch.setattr(worker_client, "KEYS_S", PATIENCE_S)
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="dmn-")))
        with without_housekeeper():
            backs = [await stack.enter_async_context(open_rooms(settings, encoder)) for encoder in encoders]
        paths = [str(folder / str(i)) for i in range(len(backs))]
        shown = CollectorRegistry()
        front = Front(settings, paths, Metrics(shown), shown)
        await stack.enter_async_context(front.in_touch())
        transport = httpx.ASGITransport(front, raise_app_exceptions=False)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test"))
        own = Street(front, client, backs, paths)
        stack.push_async_callback(own.empty)
        for encoder in encoders:
            if isinstance(encoder, GatedEncoder):
                stack.callback(encoder.gate.set)
        for at in range(len(backs)):
            await own.come(at)
        yield own


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return what is decoded, as it is."""
    seen: list[bytes] = []
    real = decode_pool.develop

    def noted(data: bytes, **how: Any) -> Developed:
        seen.append(data)
        return real(data, **how)

    monkeypatch.setattr(decode_pool, "develop", noted)
    return seen


# What is let in -------------------------------------------------------------------------------------------------------


async def test_nothing_is_decoded_of_a_call_that_is_not_let_in(decoded: list[bytes]) -> None:
    encoder = GatedEncoder()
    async with street(encoder, queue_images=2, batch_images=2) as own:
        problem(await own.house.classify(RED), "no-classes")
        problem(await own.house.classify(RED, tenant="nobody"), "unknown-tenant")
        await own.house.put()
        problem(await own.house.classify(RED, views=1000), "limit-exceeded")
        problem(await own.house.classify(RED, GREEN, BLUE), "invalid-request")
        problem(await own.house.classify(RED, headers={"Idempotency-Key": ""}), "invalid-request")
        assert not decoded
        encoder.shut()
        held = asyncio.create_task(own.house.classify(RED, GREEN))
        await encoder.reached()
        await until(lambda: len(decoded) == 2)
        answer = await soon(own.house.classify(BLUE))
        assert problem(answer, "queue-full")["retry_after"] >= 1
        encoder.gate.set()
        assert (await soon(held)).status_code == 200
        assert sorted(decoded) == sorted([RED, GREEN])


async def test_a_retry_gets_the_first_answer_with_nothing_decoded(decoded: list[bytes]) -> None:
    async with street(SoftEncoder()) as own:
        await own.house.put()
        first, again = [await own.house.classify(RED, headers={"Idempotency-Key": "k"}) for _ in range(2)]
        assert first.text == again.text
        assert first.status_code == 200
        assert decoded == [RED]
        other = await own.house.classify(GREEN, headers={"Idempotency-Key": "k"})
        problem(other, "idempotency-conflict")


async def test_images_are_answered_in_order_however_long_each_takes_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    second, real = threading.Event(), decode_pool.develop

    def last_first(data: bytes, **how: Any) -> Developed:
        if data == RED:
            assert second.wait(PATIENCE_S)
        done = real(data, **how)
        second.set()
        return done

    monkeypatch.setattr(decode_pool, "develop", last_first)
    async with street(SoftEncoder()) as own:
        await own.house.put()
        answer = await soon(own.house.classify(RED, GREEN, b"no image"))
        told = answer.json()["predictions"]
        assert [one["label"] for one in told] == ["red", "green", None]
        assert told[2]["error"]["type"] == "/problems/image-unreadable"


async def test_an_unexpected_fault_with_one_image_is_no_fault_of_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    real = decode_pool.develop

    def faulty(data: bytes, **how: Any) -> Developed:
        if data == RED:
            raise RuntimeError("swordfish")
        return real(data, **how)

    monkeypatch.setattr(decode_pool, "develop", faulty)
    async with street(SoftEncoder()) as own:
        await own.house.put()
        answer = await soon(own.house.classify(RED, GREEN))
        told = answer.json()["predictions"]
        assert told[0]["error"]["type"] == "/problems/internal"
        assert told[1]["label"] == "green"
        assert "swordfish" not in answer.text


# Who leaves -----------------------------------------------------------------------------------------------------------


async def test_who_leaves_before_an_image_is_decoded_is_not_decoded_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, seen, real = threading.Event(), [], decode_pool.develop

    def gated(data: bytes, **how: Any) -> Developed:
        seen.append(data)
        assert gate.wait(PATIENCE_S)
        return real(data, **how)

    monkeypatch.setattr(decode_pool, "develop", gated)
    async with street(SoftEncoder(), decode_workers=1) as own:
        await own.house.put()
        held = asyncio.create_task(own.house.classify(RED))
        await until(lambda: seen == [RED])
        call = RawCall(app=own.house.app, path="/classify", body=[GREEN], headers=PNG)
        leaving = asyncio.create_task(call.run())
        await until(lambda: own.taken == [2])
        call.gone.set()
        await leaving
        await until(lambda: own.taken == [1])
        gate.set()
        assert (await soon(held)).status_code == 200
        assert seen == [RED]


async def test_who_leaves_before_a_batch_is_not_encoded_and_not_learned_for() -> None:
    encoder = GatedEncoder()
    async with street(encoder) as own:
        await own.house.put()
        encoder.shut()
        held = asyncio.create_task(own.house.classify(RED))
        await encoder.reached()
        before = encoder.images
        call = RawCall(app=own.house.app, path="/classify", body=[GREEN], headers=PNG)
        leaving = asyncio.create_task(call.run())
        await until(lambda: len(own.backs[0].batcher._waiting) == 1)
        call.gone.set()
        await leaving
        await until(lambda: own.taken == [1])
        encoder.gate.set()
        assert (await soon(held)).status_code == 200
        assert encoder.images - before == 1
        assert [one["count"] for one in (await own.house.memory())["dynamic"]["classes"]] == [1, 0, 0]


async def test_a_front_that_is_gone_takes_its_calls_with_it() -> None:
    encoder = GatedEncoder()
    async with street(encoder) as own:
        await own.house.put()
        encoder.shut()
        held = asyncio.create_task(own.house.classify(RED, GREEN))
        await encoder.reached()
        assert own.taken == [2]
        line = own.front._windows[0]._line
        assert line is not None
        line.close()
        problem(await soon(held), "queue-full")
        await until(lambda: own.taken == [0])


async def test_who_leaves_in_the_midst_of_a_body_that_is_passed_on_is_missed() -> None:
    async with street(SoftEncoder()) as own:
        await own.house.put()
        call = RawCall(app=own.house.app, path="/admin/memory/import", body=[b"half"], leaves=True)
        await call.run()
        await until(lambda: "default" not in own.backs[0].dock)
        assert (await own.house.memory())["tenant"] == "default"


# Who is gone ----------------------------------------------------------------------------------------------------------


async def test_calls_in_flight_hear_at_once_that_their_back_is_gone_and_later_ones_until_it_comes_again() -> None:
    encoder = GatedEncoder()
    async with street(encoder) as own:
        await own.house.put()
        encoder.shut()
        held = asyncio.create_task(own.house.classify(RED))
        await encoder.reached()
        going = asyncio.create_task(own.go(0))
        problem(await soon(held), "queue-full")
        encoder.gate.set()
        await going
        for answer in (await own.house.classify(RED), await own.client.get("/memory"), await own.house.put("other")):
            assert problem(answer, "queue-full")["retry_after"] >= 1
        ready = await own.client.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["workers"]) == (503, {"ok": False, "detail": "0 of 1"})
        assert (await own.client.get("/livez")).status_code == 200
        await own.come(0)
        assert (await own.client.get("/readyz")).status_code == 200
        assert (await own.house.classify(RED)).status_code == 200


async def test_a_back_that_hangs_costs_no_more_than_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there, and says nothing more."""
    for module in (worker_client, front_module):
        monkeypatch.setattr(module, "GRACE_S", 0.0)
    lines: list[Line] = []

    def met(line: Line) -> None:
        if not lines:
            line.send({"is": "here", "preprocess": asdict(FakeEncoder.preprocess)})
        lines.append(line)

    shown = CollectorRegistry()
    with TemporaryDirectory(prefix="dmn-") as folder:
        server = await asyncio.get_running_loop().create_unix_server(lambda: Line(met), f"{folder}/s")
        front = Front(Settings(http_workers=1, deadline_ms=20), [f"{folder}/s"], Metrics(shown), shown)
        transport = httpx.ASGITransport(front)
        try:
            async with front.in_touch() as there, httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                await there.wait()
                problem(await soon(client.post("/classify", content=RED, headers=IMAGE)), "deadline-exceeded")
                problem(await soon(client.get("/memory", headers={"X-Deadline-Ms": "20"})), "deadline-exceeded")
        finally:
            for line in lines:
                line.close()
            server.close()


# Where calls go -------------------------------------------------------------------------------------------------------


def at_home(own: Street, at: int) -> str:
    """Return a tenant whose calls go to a back."""
    return next(name for name in map("t{}".format, range(100)) if own.front._home(name) is own.front._windows[at])


async def test_all_that_a_tenant_asks_goes_to_one_back_and_tenants_spread_over_both() -> None:
    async with street(SoftEncoder(), SoftEncoder()) as own:
        for i in range(8):
            await own.house.put(f"t{i}")
            assert await own.house.outcomes(RED, tenant=f"t{i}") == ["filled"]
            assert await own.house.outcomes(RED, tenant=f"t{i}") == ["duplicate"]
            query = await own.client.post(
                f"/classify?tenant=t{i}", content=GREEN, headers={"Content-Type": "image/png"}
            )
            assert query.status_code == 200
            assert [len(bank) for bank in (await own.house.banks(f"t{i}")).values()] == [1, 1, 0]
            assert (await own.client.get(f"/tenants/t{i}")).status_code == 200
        homes = [len(rooms.archive.tenants) for rooms in own.backs]
        assert sum(homes) == 8
        assert min(homes) > 0


async def test_while_a_back_is_away_its_tenants_go_elsewhere_and_no_one_elses() -> None:
    async with street(SoftEncoder(), SoftEncoder(), SoftEncoder()) as own:
        before = {name: own.front._home(name) for name in map("t{}".format, range(60))}
        await own.go(1)
        after = {name: own.front._home(name) for name in before}
        gone = own.front._windows[1]
        assert gone in before.values()
        assert gone not in after.values()
        assert all(after[name] is before[name] for name in before if before[name] is not gone)
        assert len({after[name] for name in before if before[name] is gone}) == 2
        await own.come(1)
        assert {name: own.front._home(name) for name in before} == before


async def test_a_crowded_back_lets_calls_go_to_an_emptier_one_but_not_those_with_a_key() -> None:
    encoder, other = GatedEncoder(), SoftEncoder()
    async with street(encoder, other, batch_images=2) as own:
        name = at_home(own, 0)
        await own.house.put(name)
        await own.go(0)
        await own.house.put(name)  # the backs of this street share no store
        await own.come(0)
        encoder.shut()
        calls = [asyncio.create_task(own.house.classify(RED, tenant=name)) for _ in range(3)]
        await until(lambda: own.taken == [3, 0])
        assert (await soon(own.house.classify(GREEN, tenant=name))).status_code == 200
        assert (own.taken, other.images) == ([3, 0], 2)  # one of them to warm up
        calls.append(asyncio.create_task(own.house.classify(BLUE, tenant=name, headers={"Idempotency-Key": "k"})))
        await until(lambda: own.taken == [4, 0])
        encoder.gate.set()
        assert {(await soon(call)).status_code for call in calls} == {200}


# Keys -----------------------------------------------------------------------------------------------------------------

OPERATOR_KEY = "correct-horse-battery-staple"


async def issue(own: Street, tenant: str, *scopes: str) -> dict[str, str]:
    """Make a key, and return the header that shows it."""
    key, id_ = new_key(tenant)
    await own.backs[0].store.keep_key(StoredKey(id=id_, digest=hash_of(key), scopes=scopes, created=0.0))
    return {"Authorization": f"Bearer {key}"}


async def test_a_key_is_looked_at_before_anything_is_decoded_and_by_front_and_back_alike(decoded: list[bytes]) -> None:
    operator = {"Authorization": f"Bearer {OPERATOR_KEY}"}
    async with street(SoftEncoder(), auth="keys", operator_key=OPERATOR_KEY) as own:
        client = own.client
        assert (await client.put("/tenants/shop", json={"classes": ["red"]}, headers=operator)).status_code == 201
        good, memory, admin, metrics = [
            await issue(own, "shop", scope) for scope in ("classify", "memory", "admin", "metrics")
        ]
        wrong = {"Authorization": f"Bearer {new_key('shop')[0]}"}
        for headers, slug in (({}, "unauthenticated"), (wrong, "unauthenticated"), (memory, "forbidden")):
            answer = await client.post("/classify", content=RED, headers=IMAGE | headers)
            problem(answer, slug)
            assert ("www-authenticate" in answer.headers) == (slug == "unauthenticated")
        for name in ("nobody", "default"):
            answer = await client.post("/classify", content=RED, headers=IMAGE | good | {"X-Tenant": name})
            problem(answer, "forbidden")
        assert not decoded
        assert (await client.post("/classify", content=RED, headers=IMAGE | good)).json()["tenant"] == "shop"
        assert decoded == [RED]
        for path, key in (("/memory", memory), ("/tenants/shop", admin), ("/metrics", metrics)):
            problem(await client.get(path), "unauthenticated")
            problem(await client.get(path, headers=good), "forbidden")
            assert (await client.get(path, headers=key)).status_code == 200
            assert (await client.get(path, headers=operator)).status_code == 200
        assert (await client.get("/memory", headers=memory)).json()["tenant"] == "shop"
        for path in ("/livez", "/readyz", "/version", "/problems/internal", "/openapi.json", "/docs"):
            assert (await client.get(path)).status_code == 200


async def test_a_front_whose_backs_are_gone_lets_nobody_in_by_a_key_that_it_does_not_know() -> None:
    async with street(SoftEncoder(), auth="keys", operator_key=OPERATOR_KEY) as own:
        key = await issue(own, "shop", "classify")
        await own.go(0)
        problem(await own.client.post("/classify", content=RED, headers=IMAGE | key), "queue-full")


async def test_a_front_hears_from_its_back_that_the_store_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: object) -> None:
        raise StoreDown("The store does not answer.", retry_after_s=2.0)

    monkeypatch.setattr(InProcessStore, "find_keys", away)
    async with street(SoftEncoder(), auth="keys", operator_key=OPERATOR_KEY) as own:
        key = await issue(own, "shop", "classify")
        answer = await own.client.post("/classify", content=RED, headers=IMAGE | key)
        problem(answer, "store-down")
        assert answer.headers["retry-after"] == "2"


async def test_a_request_that_is_passed_on_goes_to_the_back_of_its_keys_tenant() -> None:
    async with street(SoftEncoder(), SoftEncoder(), auth="keys", operator_key=OPERATOR_KEY) as own:
        for at in range(2):
            scope = {"type": "http", "path": "/memory", "query_string": b""}
            key = new_key(at_home(own, at))[0]
            tenant = front_module._tenant_of(scope | {"headers": [(b"authorization", f"Bearer {key}".encode())]})
            assert own.front._home(tenant) is own.front._windows[at]
