"""Two tenants under a hostile third: no name, count or content of one shows to another, whatever is asked.

The law behind all of it: what the third is told is the same whether the others are there, or not. Durations may tell:
batches, threads and the worker are shared. So `Server-Timing` and `Retry-After` are looked at for their form alone.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, unquote

import httpx
import pytest
import pytest_asyncio

from service.errors import StoreAway
from service.stores.in_process import InProcessStore
from service.telemetry import logs
from tests.integration.test_fronts import street
from tests.integration.test_keys import OPERATOR_KEY, bearer, issue
from tests.support.fakes import picture
from tests.support.house import (
    PATIENCE_S,
    Build,
    GatedEncoder,
    House,
    Json,
    SoftEncoder,
    opened,
    problem,
    soon,
    until,
    zipped,
)
from tests.support.servers import BINARIES, server

ACME, BOLT, EVIL = "acme", "bolt", "evil"
"""Names of one length: a file that says one of them is easily made to say another."""

OTHERS = {ACME: ("quokka red", "quokka green"), BOLT: ("wombat green", "wombat blue")}
"""The two tenants, and their classes."""

STOLEN_CLASSES = [name for own in OTHERS.values() for name in own]
"""What the third calls its own classes: the same, so that their ids are the same, and those of slots and shots."""

MARKS = (ACME, BOLT, "quokka", "wombat", "holiday")
"""Words that only belong to the others: names of tenants, of classes, and of a file."""

ONCE = {"Idempotency-Key": "once"}
RED, GREEN, BLUE = (picture(colour, 1) for colour in ("red", "green", "blue"))
PNG = {"Content-Type": "image/png"}

Try = tuple[str, str, dict[str, Any]]
"""A call: method, path, and what else the client is told."""


@dataclass(kw_only=True)
class World:
    """A service with keys for three tenants, and what the others have that could be stolen."""

    house: House
    keys: dict[str, str]
    stolen: dict[str, str] = field(default_factory=dict)
    living: list[str] = field(default_factory=list)
    turns: int = 0

    async def ask(self, tenant: str, method: str, path: str, **more: Any) -> httpx.Response:
        """Make a call with a tenant's key."""
        headers = httpx.Headers(bearer(self.keys[tenant]))
        headers.update(more.pop("headers", {}))
        return await self.house.client.request(method, path, headers=headers, **more)

    async def have(self, tenant: str, method: str, path: str, **more: Any) -> Json:
        """Make a call that has to go well, and return its answer."""
        answer = await self.ask(tenant, method, path, **more)
        assert answer.status_code < 300, answer.text
        return dict(answer.json())

    async def classify(self, tenant: str, image: bytes, headers: Mapping[str, str] = PNG, **query: Any) -> Json:
        """Classify an image of a tenant."""
        return await self.have(tenant, "POST", "/classify", content=image, headers=PNG | dict(headers), params=query)

    async def upload(self, tenant: str, label: str, image: bytes) -> str:
        """Upload a shot of a tenant, and return its id."""
        parts = {"data": {"label": label}, "files": [("images", ("holiday.png", image, "image/png"))]}
        return str((await self.have(tenant, "POST", "/memory/static", **parts))["shots"][0]["id"])

    async def others_move_in(self) -> None:
        """Let the others be there, with a bit of everything."""
        for tenant, classes in OTHERS.items():
            await self.have(tenant, "PUT", f"/tenants/{tenant}", json={"classes": list(classes)})
            self.living.append(tenant)
            await self.others_live()
            for seed, name in enumerate(classes):
                self.stolen[f"{tenant} shot"] = await self.upload(tenant, name, picture("white", seed))
            told = await self.classify(tenant, picture("yellow", 5))
            self.stolen[f"{tenant} slot"] = str(told["predictions"][0]["learned"]["slot"])
            self.stolen[f"{tenant} class"] = str(told["predictions"][0]["learned"]["label"])
            job = (await self.have(tenant, "POST", "/memory/static/train"))["id"]
            await self.house.rooms.jobs.wait(job, PATIENCE_S)
            self.stolen[f"{tenant} job"] = job
            self.stolen[f"{tenant} snapshot"] = (await self.have(tenant, "POST", "/admin/memory/snapshots"))["id"]

    async def others_live(self) -> None:
        """Let one of the others, in turn, do what tenants do: the same pictures and keys as the third, and more."""
        self.turns += 1
        tenant = self.living[self.turns % len(self.living)]
        named = {"X-Request-ID": f"{tenant}-{self.turns}"}
        await self.classify(tenant, picture("blue", self.turns), named, explain=True)
        if self.turns // 2 % 2:
            await self.classify(tenant, RED, ONCE | named)
        if self.turns % 15 == 0:
            await self.upload(tenant, OTHERS[tenant][0], picture("red", self.turns))

    async def somebody_lives(self) -> None:
        """Let a tenant that is none of the three use the service."""
        client, headers = self.house.client, bearer(OPERATOR_KEY)
        if not self.turns:
            await client.put("/tenants/default", json={"classes": ["red", "green"]}, headers=headers)
        self.turns += 1
        await client.post("/classify", content=RED, headers=headers | PNG)

    async def state(self, tenant: str) -> list[Json]:
        """Return all that a tenant can see of itself."""
        paths = [f"/tenants/{tenant}", "/memory", "/memory/static", "/admin/memory/snapshots", "/jobs"]
        paths += [f"/memory/dynamic/{quote(name)}" for name in OTHERS[tenant]]
        return [await self.have(tenant, "GET", path) for path in paths]


Kind = Literal["as it comes", "no room for anything", "HTTP in another process", "memories in a server"]
KINDS = (
    "as it comes",
    "no room for anything",
    "HTTP in another process",
    pytest.param("memories in a server", marks=pytest.mark.slow),
)


@asynccontextmanager
async def world(kind: Kind = "as it comes", **settings: Any) -> AsyncIterator[World]:
    """Open a service of a kind, in which all three have keys, and none of them is there yet."""
    told: dict[str, Any] = {"auth": "keys", "operator_key": OPERATOR_KEY, **settings}
    async with AsyncExitStack() as stack:
        if kind == "no room for anything":
            told |= {"hot_memory_bytes": 1, "text_cache_bytes": 1, "queue_images": 4, "tenant_queue_images": 2}
        if kind == "memories in a server":
            binary = BINARIES["valkey"] or BINARIES["redis"]
            if binary is None:
                pytest.skip("no Valkey or Redis server is installed")
            told["store"] = stack.enter_context(server(str(binary))).url
        if kind == "HTTP in another process":
            house = (await stack.enter_async_context(street(SoftEncoder(), **told))).house
        else:
            house = await stack.enter_async_context(opened(SoftEncoder(), **told))
        yield await inhabited(house)


async def inhabited(house: House) -> World:
    """Give all three a key in a house."""
    scopes = ("classify", "memory", "admin")
    return World(house=house, keys={name: await issue(house, name, *scopes) for name in (*OTHERS, EVIL)})


# What the third tries -------------------------------------------------------------------------------------------------


def own_affairs() -> Iterator[Try]:
    """Yield what it may do, made to collide with what the others have wherever it can."""
    yield "PUT", f"/tenants/{EVIL}", {"json": {"classes": STOLEN_CLASSES}}
    for image in (RED, GREEN, BLUE):
        for headers in (PNG, PNG | ONCE):
            yield "POST", "/classify", {"content": image, "headers": headers, "params": {"explain": "true"}}
    yield "POST", "/classify", {"content": RED, "headers": PNG | ONCE, "params": {"top_k": "2"}}
    yield "POST", "/classify", {"content": b"no image", "headers": PNG}
    for at, name in enumerate(STOLEN_CLASSES):
        parts = [("images", ("holiday.png", picture("white", at), "image/png"))]
        yield "POST", "/memory/static", {"data": {"label": name}, "files": parts}
    yield "POST", "/admin/memory/snapshots", {"headers": ONCE}
    yield "POST", "/memory/static/train", {}
    for path in ("/jobs", "/jobs/{job}", "/memory", "/memory/static", "/admin/memory/snapshots"):
        yield "GET", path, {}
    for name in STOLEN_CLASSES:
        yield "GET", f"/memory/dynamic/{quote(name)}", {"params": {"limit": "1000"}}
    yield "GET", "/admin/memory/snapshots/{snapshot}", {}
    yield "POST", "/admin/memory/snapshots/{snapshot}/restore", {}
    yield "POST", "/admin/memory/reset", {"json": {"scope": "dynamic"}, "headers": ONCE | {"X-Request-ID": "x-acme"}}
    yield "POST", f"/tenants/{EVIL}/classes", {"json": {"classes": ["quokka red"]}}
    yield "POST", f"/tenants/{EVIL}/classes", {"json": {"classes": ["white"]}, "headers": {"Idempotency-Key": "two"}}
    yield "POST", "/classify", {"content": RED, "headers": PNG}
    yield "DELETE", "/memory/static/train", {}


def others_names() -> Iterator[Try]:
    """Yield calls for another tenant, wherever it may be named, and what only an operator may ask."""
    for name in OTHERS:
        for more in ({"headers": {"X-Tenant": name}}, {"params": {"tenant": name}}, {"params": {"TENANT": name}}):
            yield "GET", "/memory", more
            yield "POST", "/admin/memory/snapshots", more
            yield "GET", "/admin/memory/export", more
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/classes"), ("DELETE", "/classes/quokka%20red")):
            yield method, f"/tenants/{name}{path}", {}
        yield "PUT", f"/tenants/{name}", {"json": {"classes": ["red"]}}
        for odd in (f"evil%2f..%2f{name}", f"{name}%00", f"{name}%2e", name.upper(), f"{{{name}}}", f"*{name[1:]}"):
            yield "GET", f"/tenants/{odd}", {}
        yield "GET", f"/memory/dynamic/..%2f..%2f{name}%2fquokka red", {}
        yield "POST", "/memory/static", {"data": {"label": "white", "tenant": name}, "files": [("images", RED)]}
        yield "PUT", f"/tenants/{EVIL}", {"json": {"classes": STOLEN_CLASSES, "tenant": name}}
        zipped_up = zipped({f"../{name}/white/1.png": RED})
        yield "POST", "/memory/static", {"content": zipped_up, "headers": {"Content-Type": "application/zip"}}
        forged = f"dmn_{name}_{'0' * 12}_{'0' * 48}"
        yield "GET", "/memory", {"headers": {"Authorization": f"Bearer {forged}"}}
    for path in ("/tenants", "/tenants?limit=1", "/metrics"):
        yield "GET", path, {}


def others_ids(stolen: Mapping[str, str]) -> Iterator[Try]:
    """Yield calls that ask the third's own memory for what the others have there."""
    for name in OTHERS:
        job, snapshot, shot = (stolen[f"{name} {what}"] for what in ("job", "snapshot", "shot"))
        yield "GET", f"/jobs/{job}", {}
        yield "DELETE", f"/jobs/{job}", {}
        yield "GET", f"/admin/memory/snapshots/{snapshot}", {}
        yield "POST", f"/admin/memory/snapshots/{snapshot}/restore", {}
        yield "DELETE", f"/admin/memory/snapshots/{snapshot}", {}
        yield "DELETE", f"/memory/static/{shot}x", {}
        yield "DELETE", f"/memory/dynamic/{quote(stolen[f'{name} class'])}/{stolen[f'{name} slot']}", {}
        for path, what in (("/jobs", job), ("/admin/memory/snapshots", snapshot), ("/memory/static", shot)):
            yield "GET", path, {"params": {"cursor": base64.urlsafe_b64encode(what.encode()).decode()}}
    yield "DELETE", f"/memory/static/{stolen[f'{ACME} shot']}", {}
    yield "DELETE", "/memory/static", {"params": {"label": "wombat blue"}}


def open_doors() -> Iterator[Try]:
    """Yield what anybody may ask, and as a cache would."""
    for path in ("/livez", "/readyz", "/version", "/docs", "/openapi.json", "/problems/internal", "/problems/acme"):
        yield "GET", path, {"headers": {"If-None-Match": "*"}}
    yield "HEAD", "/memory", {}
    yield "GET", "/memory", {"headers": {"If-Modified-Since": "Wed, 25 Nov 2026 00:00:00 GMT", "Range": "bytes=0-1"}}
    yield "GET", "/acme", {}


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one call was told, without what may differ anyway; `raw` is all of it."""

    asked: str
    status: int
    headers: dict[str, str]
    body: Any
    raw: str


class Attack:
    """The third at work, and a record of what it was told."""

    def __init__(self, own: World) -> None:
        self._world = own
        self._ids: dict[str, str] = {"none": "none"}
        self.told: list[Told] = []
        self.request_ids: list[str] = []

    async def run(self, stolen: Mapping[str, str], between: Callable[[], Awaitable[None]]) -> list[Told]:
        """Try everything, with something done by others after each own affair and after every third other call."""
        for one in own_affairs():
            await self.attempt(*one)
            await between()
        for number, one in enumerate((*others_names(), *others_ids(stolen), *open_doors())):
            await self.attempt(*one)
            if number % 3 == 0:
                await between()
        file = (await self.attempt("GET", "/admin/memory/export", {})).content
        for name in (EVIL, *OTHERS):
            await between()
            await self.attempt("POST", "/admin/memory/import", {"content": file.replace(b"evil", name.encode())})
        await self.attempt("DELETE", f"/tenants/{EVIL}", {})
        await self._forgotten()
        await self.attempt("GET", "/memory", {})
        return self.told

    async def _forgotten(self) -> None:
        """Return when its key is taken no more: another process than that which revoked it may know it a while."""
        async with asyncio.timeout(PATIENCE_S):
            while (await self._world.ask(EVIL, "GET", "/memory")).status_code != 401:  # noqa: ASYNC110 - no event says so
                await asyncio.sleep(0.05)

    async def attempt(self, method: str, path: str, more: dict[str, Any]) -> httpx.Response:
        filled = re.sub(r"\{(job|snapshot)\}", lambda found: self._ids[found[1]], path)
        answer = await self._world.ask(EVIL, method, filled, **more)
        if answer.status_code == 202:
            await self._world.house.rooms.jobs.wait(answer.json()["id"], PATIENCE_S)
        self.request_ids.append(answer.headers["x-request-id"])
        asked = {name: value for name, value in more.items() if name not in ("content", "files")}
        self.told.append(self._noted(f"{method} {path} {asked}", answer))
        return answer

    def _noted(self, asked: str, answer: httpx.Response) -> Told:
        headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
        if "server-timing" in headers:
            headers["server-timing"] = re.sub(r"[\d.]+", "", headers["server-timing"])
        if answer.status_code < 300:
            headers.pop("content-length", None)  # numbers differ in their last digits, and so in how many they have
        body: Any = answer.text
        if answer.content and "json" in headers.get("content-type", ""):
            body = self._plain(answer.json())
        elif "octet-stream" in headers.get("content-type", ""):
            body = len(answer.content)
        raw = f"{answer.headers} {answer.content.decode('latin-1')}"
        return Told(asked=asked, status=answer.status_code, headers=headers, body=body, raw=raw)

    def _plain(self, value: Any) -> Any:
        """Return JSON without times and the ids that are drawn, which are noted."""
        if isinstance(value, list):
            return [self._plain(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "id" in value and ("kind" in value or "reason" in value):
            self._ids["job" if "kind" in value else "snapshot"] = value["id"]
            value = value | {"id": "drawn"}
        varies = ("request_id", "created", "trained", "eta_s", "progress")
        return {name: self._plain(own) for name, own in value.items() if name not in varies}


@dataclass(frozen=True, kw_only=True)
class Siege:
    """All that came of an attack while the others were there: what it was told, the log, and the metrics."""

    kind: Kind
    told: list[Told]
    request_ids: list[str]
    lines: list[Json]
    metrics: str
    stolen: dict[str, str]
    keys: dict[str, str]


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=KINDS)
async def siege(request: pytest.FixtureRequest) -> Siege:
    """Have the third try everything, with the others at work in between."""
    kind: Kind = request.param
    with logged() as lines:
        async with world(kind) as own:
            await own.others_move_in()
            attack = Attack(own)
            told = await attack.run(own.stolen, own.others_live)
            watcher = bearer(await issue(own.house, "", "metrics"))
            metrics = (await own.house.client.get("/metrics", headers=watcher)).text
        return Siege(
            kind=kind,
            told=told,
            request_ids=attack.request_ids,
            lines=lines(),
            metrics=metrics,
            stolen=own.stolen,
            keys=own.keys,
        )


@contextmanager
def logged() -> Iterator[Callable[[], list[Json]]]:
    """Give what returns all lines of the log so far, each as it was when it was written."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs._Json(""))
    before = logs.logger.level
    logs.logger.addHandler(handler)
    logs.logger.setLevel(logging.DEBUG)
    try:
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    finally:
        logs.logger.removeHandler(handler)
        logs.logger.setLevel(before)


async def nothing() -> None:
    """Let nobody do anything."""


def alike(one: Any, other: Any) -> bool:
    """Return whether two values are the same but for the rounding of numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-3, abs=1e-3)
    return bool(one == other)


# Answers, problems, headers -------------------------------------------------------------------------------------------


async def test_what_the_third_is_told_is_the_same_whether_the_others_are_there_or_not(siege: Siege) -> None:
    async with world(siege.kind) as quiet:
        # Where no two memories fit, that one was dropped may show: a picture that is sent again is counted again. So
        # there somebody else is always there.
        crowd = quiet.somebody_lives if siege.kind == "no room for anything" else nothing
        alone = await Attack(quiet).run(siege.stolen, crowd)
    assert len(siege.told) == len(alone) > 100
    for one, other in zip(siege.told, alone, strict=True):
        assert (one.asked, one.status, one.headers) == (other.asked, other.status, other.headers)
        assert alike(one.body, other.body), (one, other)
    assert {one.status for one in alone} >= {200, 201, 202, 204, 401, 403, 404, 422}


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_the_third_does_the_others_have_what_they_had(kind: Kind) -> None:
    async with world(kind) as own:
        await own.others_move_in()
        before = [one for tenant in OTHERS for one in await own.state(tenant)]
        await Attack(own).run(own.stolen, nothing)
        after = [one for tenant in OTHERS for one in await own.state(tenant)]
        for was, now in zip(before, after, strict=True):
            assert alike(was, now), (was, now)
        for tenant, classes in OTHERS.items():
            assert (await own.classify(tenant, RED, ONCE))["predictions"][0]["label"] in classes


async def test_no_answer_problem_or_header_says_a_name_or_an_id_of_anothers_that_was_not_in_the_call() -> None:
    async with world() as own:
        await own.others_move_in()
        await own.have(EVIL, "PUT", f"/tenants/{EVIL}", json={"classes": ["red", "blue"]})
        attack = Attack(own)
        # Not with what it may do under the same names: there they are its own.
        for part in (others_names(), others_ids(own.stolen), open_doors()):
            for one in part:
                await attack.attempt(*one)
            await own.others_live()
    secret = {*MARKS, *own.stolen.values(), *own.keys.values()} - {own.keys[EVIL]}
    for told in attack.told:
        said, asked = told.raw.lower(), unquote(told.asked).lower()
        assert not [word for word in secret if word in said and word not in asked], told


async def test_the_ids_of_requests_do_not_count_what_the_others_ask() -> None:
    async with world() as own:
        await own.others_move_in()
        ids = [(await own.ask(EVIL, "GET", "/memory")).headers["x-request-id"] for _ in range(400)]
    assert len(set(ids)) == len(ids)
    assert {len(one) for one in ids} == {32}
    # Whatever part of an id could count: every digit of it takes every value.
    for digit in zip(*ids, strict=True):
        assert len(set(digit)) == 16


@pytest.mark.parametrize("tenant", [EVIL, ACME])
async def test_server_timing_tells_durations_of_stages_and_nothing_else(tenant: str) -> None:
    async with world() as own:
        await own.others_move_in()
        await own.have(EVIL, "PUT", f"/tenants/{EVIL}", json={"classes": STOLEN_CLASSES})
        answer = await own.ask(tenant, "POST", "/classify", content=RED, headers=PNG)
    stages = "decode|queue|encode|memory|store"
    assert re.fullmatch(rf"((^|, )({stages});dur=\d+\.\d)+", answer.headers["server-timing"])


async def test_a_full_server_does_not_say_how_many_images_of_whom_are_in_it(build: Build) -> None:
    refusals = []
    for theirs in (1, 2):
        encoder = GatedEncoder()
        house = await build(
            encoder, auth="keys", operator_key=OPERATOR_KEY, queue_images=9, tenant_queue_images=3, batch_images=1
        )
        own = await inhabited(house)
        await own.others_move_in()
        await own.have(EVIL, "PUT", f"/tenants/{EVIL}", json={"classes": STOLEN_CLASSES})
        encoder.shut()
        held = [asyncio.create_task(own.classify(ACME, picture("red", at))) for at in range(theirs)]
        held += [asyncio.create_task(own.classify(EVIL, picture("red", at))) for at in range(3)]
        await encoder.reached()
        await until(lambda: house.rooms.batcher.taken == len(held))  # noqa: B023 - awaited before the next round
        told = problem(await soon(own.ask(EVIL, "POST", "/classify", content=RED, headers=PNG)), "queue-full")
        refusals.append({name: told[name] for name in told if name not in ("request_id", "retry_after")})
        encoder.gate.set()
        await asyncio.gather(*held)
    assert refusals[0] == refusals[1]
    assert "3 here" in refusals[0]["detail"]


# Caches ---------------------------------------------------------------------------------------------------------------


async def test_one_idempotency_key_is_another_for_each_tenant() -> None:
    async with world() as own:
        await own.others_move_in()
        await own.have(EVIL, "PUT", f"/tenants/{EVIL}", json={"classes": ["red", "blue"]})
        told = {tenant: await own.classify(tenant, BLUE, {"Idempotency-Key": "k"}) for tenant in (*OTHERS, EVIL)}
        assert {tenant: one["tenant"] for tenant, one in told.items()} == {tenant: tenant for tenant in told}
        again = {tenant: await own.classify(tenant, BLUE, {"Idempotency-Key": "k"}) for tenant in told}
        assert again == told
        # Another call under a key that only another has used is no conflict, and does not wait for it.
        await own.ask(ACME, "POST", "/admin/memory/snapshots", headers={"Idempotency-Key": "theirs"})
        body = {"json": {"scope": "dynamic"}, "headers": {"Idempotency-Key": "theirs"}}
        assert (await own.ask(EVIL, "POST", "/admin/memory/reset", **body)).status_code == 200


async def test_nobody_waits_for_the_idempotency_key_of_another(build: Build) -> None:
    encoder = GatedEncoder()
    own = await inhabited(await build(encoder, auth="keys", operator_key=OPERATOR_KEY))
    for tenant in (ACME, EVIL):
        await own.have(tenant, "PUT", f"/tenants/{tenant}", json={"classes": STOLEN_CLASSES})
    encoder.shut()
    theirs = asyncio.create_task(own.classify(ACME, RED, ONCE))
    await encoder.reached()
    answer = await soon(own.ask(EVIL, "POST", "/admin/memory/reset", json={"scope": "all"}, headers=ONCE))
    assert answer.status_code == 200
    assert not theirs.done()
    encoder.gate.set()
    assert (await theirs)["tenant"] == ACME


async def test_one_who_fills_its_room_for_answers_makes_nobody_else_forget_one(build: Build) -> None:
    own = await inhabited(await build(auth="keys", operator_key=OPERATOR_KEY, idempotency_max_bytes=2000))
    await own.others_move_in()
    await own.have(EVIL, "PUT", f"/tenants/{EVIL}", json={"classes": STOLEN_CLASSES})
    first = await own.classify(ACME, GREEN, {"Idempotency-Key": "kept"})
    for at in range(5):
        await own.classify(EVIL, GREEN, {"Idempotency-Key": str(at)})
    assert await own.classify(ACME, GREEN, {"Idempotency-Key": "kept"}) == first


async def test_prompts_that_another_had_encoded_say_the_same_as_new_ones_and_keep_their_owners_templates() -> None:
    mine = {"classes": ["quokka red", {"name": "wombat blue", "prompts": ["a red thing"]}], "templates": ["{}!"]}
    answers = []
    for others in (True, False):
        async with world() as own:
            if others:
                await own.others_move_in()
            await own.have(EVIL, "PUT", f"/tenants/{EVIL}", json=mine)
            answers.append((await own.classify(EVIL, RED, learn=False))["predictions"])
    assert alike(*answers)


@pytest.mark.parametrize("kind", KINDS[:3])
async def test_hot_memories_in_one_batch_answer_each_with_its_own_classes_slots_and_shots(kind: Kind) -> None:
    async with world(kind) as own:
        await own.others_move_in()
        classes = {**OTHERS, EVIL: ("red", "white")}
        await own.have(EVIL, "PUT", f"/tenants/{EVIL}", json={"classes": ["red", "white"]})
        await own.upload(EVIL, "red", picture("red", 99))

        async def ask(tenant: str, seed: int) -> tuple[str, Json]:
            return tenant, await own.classify(tenant, picture("red", seed), explain=True, top_k=9)

        for seed in range(10):
            answers = await asyncio.gather(*(ask(tenant, seed) for tenant in classes))
            for tenant, told in answers:
                assert told["tenant"] == tenant
                assert labels_in(told) <= set(classes[tenant])
        shots = {tenant: await own.have(tenant, "GET", "/memory/static") for tenant in classes}
        for tenant, told in answers:
            held = {one["id"] for one in shots[tenant]["items"]}
            assert {one["shot"] for one in told["predictions"][0]["explain"]["static"]} <= held


def labels_in(value: Any) -> set[str]:
    """Return all labels in an answer."""
    if isinstance(value, list):
        return {label for one in value for label in labels_in(one)}
    if isinstance(value, dict):
        return {label for one in value.values() for label in labels_in(one)} | {value.get("label")} - {None}
    return set()


async def test_no_cache_on_the_way_may_keep_an_answer_for_another_caller(siege: Siege) -> None:
    for told in siege.told:
        assert told.headers["cache-control"] == "no-store", told
        assert not {"etag", "last-modified", "expires", "age", "set-cookie"} & set(told.headers), told
        assert told.status not in {206, 304}


# Metrics and logs, which the operator reads ---------------------------------------------------------------------------


async def test_metrics_are_totals_that_name_nobody(siege: Siege) -> None:
    assert "dmn_memory_updates_total" in siege.metrics
    secret = (*MARKS, EVIL, *siege.stolen.values(), *siege.keys.values())
    assert not [word for word in secret if word in siege.metrics.lower()]


async def test_no_line_of_the_log_that_belongs_to_a_call_of_one_tenant_tells_of_another(siege: Siege) -> None:
    marks = {ACME: (ACME, "quokka"), BOLT: (BOLT, "wombat"), EVIL: (EVIL,)}
    seen = []
    for line in siege.lines:
        told = dict(line)
        id_ = told.pop("request_id", "")
        tenant = EVIL if id_ in siege.request_ids else id_.partition("-")[0]
        if tenant in marks:
            seen.append(tenant)
            others = [word for other, words in marks.items() if other != tenant for word in words]
            assert not [word for word in others if word in json.dumps(told).lower()], line
    assert set(seen) == set(marks)
    assert len(seen) > 100


async def test_no_line_of_the_log_says_a_class_a_file_an_id_or_a_key(siege: Siege) -> None:
    whole = json.dumps(siege.lines).lower()
    ids = [value for name, value in siege.stolen.items() if "class" not in name]
    assert not [word for word in ("quokka", "wombat", "holiday", "once", *ids, *siege.keys.values()) if word in whole]


# What anybody may ask -------------------------------------------------------------------------------------------------


async def test_readiness_does_not_count_the_writes_of_tenants_that_wait(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = await inhabited(await build(auth="keys", operator_key=OPERATOR_KEY, sync_ms=60_000))
    await own.others_move_in()

    async def away(*_: object, **__: object) -> None:
        raise StoreAway("The store does not answer.", retry_after_s=1.0)

    for op in ("push", "ping"):
        monkeypatch.setattr(own.house.rooms.store, op, away)
    told = []
    for count in (1, 3):
        for at in range(count):
            answer = await own.classify(ACME, picture("red", 100 * count + at))
            assert answer["predictions"][0]["learned"]["outcome"] == "pending"
        told.append((await own.house.client.get("/readyz")).text)
    assert own.house.rooms.desk.pending == 4
    assert told[0] == told[1]
    assert "wait" in told[0]


# A name that is given away --------------------------------------------------------------------------------------------


async def test_a_name_that_goes_to_another_owner_brings_nothing_of_who_had_it() -> None:
    async with world() as own:
        await own.others_move_in()
        assert isinstance(own.house.rooms.store._store, InProcessStore)  # type: ignore[attr-defined]
        assert (await own.ask(ACME, "DELETE", f"/tenants/{ACME}")).status_code == 204
        own.keys[ACME] = await issue(own.house, ACME, "classify", "memory", "admin")
        problem(await own.ask(ACME, "GET", "/memory"), "unknown-tenant")
        await own.have(ACME, "PUT", f"/tenants/{ACME}", json={"classes": list(OTHERS[ACME])})
        answer = await own.classify(ACME, RED, ONCE)
        assert answer["predictions"][0]["learned"]["outcome"] == "filled"
        assert answer["predictions"][0]["readouts"]["static"] is None
        for path in ("/jobs", "/memory/static", "/admin/memory/snapshots"):
            assert (await own.have(ACME, "GET", path))["items"] == []
        memory = await own.have(ACME, "GET", "/memory")
        assert memory["projections"] is None
        assert memory["adaptation"]["images"] == 1
        for what in ("job", "snapshot", "shot"):
            path = {"job": "/jobs", "snapshot": "/admin/memory/snapshots", "shot": "/memory/static"}[what]
            stolen = own.stolen[f"{ACME} {what}"]
            problem(await own.ask(ACME, "DELETE", f"{path}/{stolen}"), f"unknown-{what}")
