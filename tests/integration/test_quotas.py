"""Quotas over HTTP: how much of a tenant's work is let in, by one service and by several on one store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import count
from typing import Any

import httpx
import pytest
import pytest_asyncio

from service.serialization import writer
from tests.support.fakes import picture
from tests.support.house import PATIENCE_S, Build, GatedEncoder, SoftEncoder, opened, problem, soon, until, zipped
from tests.support.servers import BINARIES, Running, server

BINARY = next((found for found in BINARIES.values() if found), None)


def needs_server(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test that starts a server."""
    return pytest.mark.slow(pytest.mark.skipif(BINARY is None, reason="no Valkey or Redis server is installed")(test))


SLOW = 1e-3
"""Images a second: none is let in again while a test runs."""

EACH = 2 * SoftEncoder.dim
"""Bytes of a feature."""

CREATED = "2026-11-25T00:00:00+00:00"
_SEEDS = count(1000)


def fresh(colour: str = "red") -> bytes:
    """Return a picture that no memory has seen."""
    return picture(colour, next(_SEEDS))


@pytest_asyncio.fixture(loop_scope="session")
async def store() -> AsyncIterator[Running]:
    assert BINARY is not None
    with server(BINARY) as running:
        yield running


def tokens(answer: httpx.Response) -> tuple[int, int]:
    """Return how many images more an answer says, and in how many seconds the bucket is full."""
    name, left, full = answer.headers["ratelimit"].split(";")
    assert name == '"images"'
    return int(left.removeprefix("r=")), int(full.removeprefix("t="))


# The bucket -----------------------------------------------------------------------------------------------------------


async def test_a_tenant_over_its_rate_is_told_when_to_come_again_and_nothing_is_learned(build: Build) -> None:
    house = await build(tenant_rate=SLOW, tenant_burst=2)
    await house.put()
    assert (await house.classify(fresh(), fresh())).status_code == 200
    before = await house.memory()
    told = problem(await house.classify(fresh()), "rate-limited")
    assert told["retry_after"] == pytest.approx(1 / SLOW, abs=PATIENCE_S)
    assert await house.memory() == before
    assert (await house.metrics())['dmn_rejected_total{reason="rate-limited"}'] == 1


async def test_views_count_like_images(build: Build) -> None:
    house = await build(tenant_rate=SLOW, tenant_burst=5)
    await house.put()
    assert (await house.classify(fresh(), views=4)).status_code == 200
    problem(await house.classify(fresh(), views=2), "rate-limited")
    assert (await house.classify(fresh())).status_code == 200


async def test_more_than_is_ever_let_in_at_once_is_no_matter_of_waiting(build: Build) -> None:
    house = await build(tenant_rate=SLOW, tenant_burst=3, tenant_concurrent=2)
    await house.put()
    told = problem(await house.classify(*[fresh() for _ in range(3)]), "limit-exceeded")
    assert "2" in told["detail"]
    assert (await house.classify(fresh(), fresh())).status_code == 200


async def test_the_largest_call_fits_into_a_bucket_of_which_nothing_is_said(build: Build) -> None:
    house = await build(tenant_rate=SLOW, max_images=8)
    await house.put()
    assert (await house.classify(*[fresh() for _ in range(8)])).status_code == 200
    problem(await house.classify(fresh()), "rate-limited")


async def test_what_is_answered_again_for_its_key_costs_nothing(build: Build) -> None:
    house = await build(tenant_rate=SLOW, tenant_burst=1)
    await house.put()
    image = fresh()
    answers = [await house.classify(image, headers={"Idempotency-Key": "one"}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200] * 4


async def test_who_is_refused_for_another_reason_keeps_its_tokens(build: Build) -> None:
    house = await build(tenant_rate=SLOW, tenant_burst=1, max_views=3)
    problem(await house.classify(fresh()), "no-classes")
    await house.put()
    problem(await house.classify(fresh(), views=4), "limit-exceeded")
    assert (await house.classify(fresh())).status_code == 200


async def test_probes_metrics_and_looking_cost_nothing(build: Build) -> None:
    house = await build(tenant_rate=SLOW, tenant_burst=1)
    await house.put()
    assert (await house.classify(fresh())).status_code == 200
    for path in ("/livez", "/readyz", "/metrics", "/memory", "/tenants/default", "/memory/static"):
        for _ in range(3):
            assert (await house.client.get(path)).status_code == 200


# Shots ----------------------------------------------------------------------------------------------------------------


async def test_shots_count_as_images_and_are_refused_with_nothing_stored(build: Build) -> None:
    house = await build(tenant_rate=SLOW, tenant_burst=2)
    await house.put()
    assert (await house.upload("red", fresh(), fresh())).status_code == 201
    problem(await house.upload("red", fresh()), "rate-limited")
    assert len(await house.shots()) == 2


async def test_an_upload_larger_than_the_bucket_goes_on_at_the_rate(build: Build) -> None:
    house = await build(tenant_rate=200.0, tenant_burst=4)
    await house.put()
    body = zipped({f"red/{i}.png": fresh() for i in range(20)})
    assert (await soon(house.upload_zip(body))).status_code == 201
    assert len(await house.shots()) == 20


async def test_an_upload_that_cannot_be_done_by_its_deadline_stores_nothing(build: Build) -> None:
    house = await build(tenant_rate=SLOW, tenant_burst=4)
    await house.put()
    problem(await soon(house.upload_zip(zipped({f"red/{i}.png": fresh() for i in range(20)}))), "rate-limited")
    assert not await house.shots()


# At work --------------------------------------------------------------------------------------------------------------


async def test_a_tenant_has_no_more_images_at_work_than_it_may_and_others_go_on(build: Build) -> None:
    encoder = GatedEncoder()
    house = await build(encoder, tenant_concurrent=2, housekeeping=True)
    await house.put("zoo")
    await house.put("farm")
    encoder.shut()
    first = [asyncio.create_task(house.classify(fresh(), tenant="zoo")) for _ in range(2)]
    await until(lambda: house.rooms.batcher.taken == 2)
    await encoder.reached()
    told = problem(await soon(house.classify(fresh(), tenant="zoo")), "rate-limited")
    assert told["retry_after"] >= 1
    other = asyncio.create_task(house.classify(fresh(), tenant="farm"))
    await until(lambda: house.rooms.batcher.taken == 3)
    encoder.gate.set()
    answers = [await soon(task) for task in (*first, other)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert (await house.classify(fresh(), tenant="zoo")).status_code == 200


async def test_a_client_that_leaves_gives_its_place_back(build: Build) -> None:
    encoder = GatedEncoder()
    house = await build(encoder, tenant_concurrent=1)
    await house.put()
    encoder.shut()
    call = asyncio.create_task(house.classify(fresh()))
    await encoder.reached()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    encoder.gate.set()
    await until(lambda: not house.rooms.batcher.taken)
    assert (await soon(house.classify(fresh()))).status_code == 200


# Several on one store -------------------------------------------------------------------------------------------------


@needs_server
async def test_while_the_store_is_away_each_process_counts_by_itself() -> None:
    assert BINARY is not None
    with server(BINARY) as running:
        async with opened(SoftEncoder(), store=running.url, tenant_rate=SLOW, tenant_burst=3) as house:
            await house.put()
            assert (await house.classify(fresh())).status_code == 200
            running.process.terminate()
            running.process.wait(PATIENCE_S)
            answers = [(await house.classify(fresh())).status_code for _ in range(5)]
            assert answers == [200] * 3 + [429] * 2


@needs_server
async def test_replicas_that_add_shots_at_once_keep_to_the_limit_together(store: Running, build: Build) -> None:
    houses = [await build(store=store.url, max_shots=6) for _ in range(3)]
    await houses[0].put()
    answers = await asyncio.gather(*(houses[i % 3].upload("red", fresh()) for i in range(15)))
    assert sorted(answer.status_code for answer in answers) == [201] * 6 + [422] * 9
    assert len(await houses[1].shots()) == 6


# What tenants are told, and what some may instead ---------------------------------------------------------------------


async def test_headers_tell_how_many_images_more_where_settings_want_them(build: Build) -> None:
    house = await build(tenant_rate=SLOW, tenant_burst=3, ratelimit_headers=True)
    await house.put()
    answers = [await house.classify(fresh()) for _ in range(4)]
    assert [tokens(answer)[0] for answer in answers] == [2, 1, 0, 0]
    assert [tokens(answer)[1] for answer in answers[:3]] == pytest.approx([1000, 2000, 3000], abs=PATIENCE_S)
    assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"images";q=3;w=3000'}
    assert answers[3].status_code == 429


@pytest.mark.parametrize("settings", [{"tenant_rate": 100.0}, {"ratelimit_headers": True}])
async def test_without_the_setting_or_without_a_rate_there_are_no_such_headers(
    build: Build, settings: dict[str, Any]
) -> None:
    house = await build(**settings)
    await house.put()
    assert not {"ratelimit", "ratelimit-policy"} & set((await house.classify(fresh())).headers)


async def test_some_tenants_may_more_or_less_than_others(build: Build) -> None:
    zoo = {"tenant_rate": SLOW, "tenant_burst": 3, "max_classes": 2, "max_shots": 1, "max_slots": 4}
    house = await build(tenant_limits={"zoo": zoo})
    problem(await house.put("zoo", slots=4), "limit-exceeded")
    problem(await house.put("zoo", classes=["red", "blue"], slots=5), "limit-exceeded")
    assert (await house.put("zoo", classes=["red", "blue"], slots=4)).status_code == 201
    assert (await house.put("farm")).status_code == 201
    more = {"classes": ["green"]}
    problem(await house.client.post("/tenants/zoo/classes", json=more), "limit-exceeded")
    assert (await house.upload("red", fresh(), tenant="zoo")).status_code == 201
    problem(await house.upload("red", fresh(), tenant="zoo"), "limit-exceeded")
    for tenant, status in (("farm", 200), ("zoo", 200), ("zoo", 429), ("farm", 200)):
        assert (await house.classify(fresh(), tenant=tenant)).status_code == status


async def test_a_tenants_own_limit_of_bytes_holds_for_slots_and_imports(build: Build) -> None:
    house = await build(tenant_limits={"zoo": {"tenant_max_bytes": 2 * EACH}})
    await house.put("zoo")
    await house.put("farm")
    assert await house.outcomes(*[fresh() for _ in range(4)], tenant="zoo") == ["filled"] * 2 + ["skipped"] * 2
    assert await house.outcomes(*[fresh() for _ in range(4)], tenant="farm") == ["filled"] * 4
    export = await house.client.get("/admin/memory/export", headers={"X-Tenant": "farm"})
    headers = {"X-Tenant": "zoo", "Content-Type": "application/octet-stream"}
    problem(await house.client.post("/admin/memory/import", content=export.content, headers=headers), "limit-exceeded")


async def test_an_import_leaves_room_for_the_features_that_its_shots_still_wait_for(build: Build) -> None:
    house = await build()
    await house.put(retention="images")
    images = [fresh() for _ in range(3)]
    assert (await house.upload("red", *images)).status_code == 201
    stored = await house.rooms.store.load("default", images=True)
    assert stored is not None
    waiting = {own: tuple(replace(shot, feature=b"") for shot in bank) for own, bank in stored.shots.items()}
    file = b"".join(writer.parts(replace(stored, shots=waiting), created=CREATED))
    kept = sum(map(len, images))
    headers = {"Content-Type": "application/octet-stream"}
    for room, status in ((kept + 3 * EACH - 1, 422), (kept + 3 * EACH, 200)):
        other = await build(tenant_max_bytes=room)
        answer = await other.client.post("/admin/memory/import", content=file, headers=headers)
        assert answer.status_code == status, answer.text
