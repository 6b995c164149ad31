"""Snapshots and rollback, export and import, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.support.fakes import picture
from tests.support.house import Build, House, Json, SoftEncoder, problem

IMAGES = [picture(colour, seed) for seed in range(4) for colour in ("red", "green", "blue")]


async def taken(house: House, tenant: str = "default") -> Json:
    answer = await house.client.post("/admin/memory/snapshots", headers={"X-Tenant": tenant})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


async def snapshots(house: House, tenant: str = "default") -> list[Json]:
    answer = await house.client.get("/admin/memory/snapshots", headers={"X-Tenant": tenant})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["items"])


async def restored(house: House, snapshot: str, tenant: str = "default") -> Json:
    path = f"/admin/memory/snapshots/{snapshot}/restore"
    answer = await house.client.post(path, headers={"X-Tenant": tenant})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def answers(house: House, tenant: str = "default") -> list[Any]:
    """Return everything that is said about a few images, to the last bit, without teaching them.

    As whoever opens the memory at this moment says it: class statistics are otherwise read as of a few images ago. One
    by one: the last bits of a feature are left open by what else is in its batch.
    """
    await house.rooms.archive.hand_in(tenant)
    asked = [
        await house.predictions(picture("red", 90 + i), tenant=tenant, learn=False, explain=True) for i in range(5)
    ]
    told = [one for (one,) in asked]
    return [(one["top"], one["readouts"], one["explain"]) for one in told]


async def fill(house: House, tenant: str = "default") -> None:
    assert (await house.upload("red", picture("red", 50), picture("red", 51), tenant=tenant)).status_code == 201
    await house.predictions(*IMAGES, tenant=tenant)


async def test_a_restore_brings_the_same_answers_back_to_the_last_bit(house: House) -> None:
    roomy = {"classes": ["red", "green", "blue"], "slots": 200}
    assert (await house.client.put("/tenants/default", json=roomy)).status_code == 200
    await fill(house)
    before, memory = await answers(house), await house.memory()
    snapshot = await taken(house)
    learned = 0
    for start in range(1000, 1180, 20):
        outcomes = await house.outcomes(
            *(picture(colour, seed) for seed in range(start, start + 20) for colour in ("red", "green", "blue"))
        )
        learned += sum(outcome in ("filled", "replaced") for outcome in outcomes)
    assert learned >= 500
    await house.upload("blue", picture("blue", 77))
    assert await answers(house) != before
    await restored(house, snapshot["id"])
    assert await answers(house) == before
    now = await house.memory()
    assert (now["dynamic"], now["static"]) == (memory["dynamic"], memory["static"])
    assert now["epoch"] > memory["epoch"]


async def test_a_restore_can_be_undone(house: House) -> None:
    snapshot = await taken(house)
    await fill(house)
    full = await answers(house)
    undo = (await restored(house, snapshot["id"]))["snapshot"]
    assert undo["reason"] == "restore"
    assert (await house.memory())["static"]["classes"][0]["count"] == 0
    await restored(house, undo["id"])
    assert await answers(house) == full


@pytest.mark.parametrize("scope", ["dynamic", "static", "all"])
async def test_a_reset_says_which_snapshot_brings_back_what_it_took(house: House, scope: str) -> None:
    await fill(house)
    before = await answers(house)
    answer = await house.client.post("/admin/memory/reset", json={"scope": scope})
    saved = answer.json()["snapshot"]
    assert saved["reason"] == "reset"
    await restored(house, saved["id"])
    assert await answers(house) == before


async def test_an_empty_memory_is_not_worth_a_snapshot(house: House) -> None:
    answer = await house.client.post("/admin/memory/reset", json={"scope": "all"})
    assert answer.json()["snapshot"] is None
    assert await snapshots(house) == []


async def test_snapshots_are_listed_from_the_newest_by_pages(house: House) -> None:
    ids = [(await taken(house))["id"] for _ in range(3)]
    first = (await house.client.get("/admin/memory/snapshots", params={"limit": 2})).json()
    assert [one["id"] for one in first["items"]] == ids[:0:-1]
    second = (await house.client.get("/admin/memory/snapshots", params={"limit": 2, "cursor": first["next"]})).json()
    assert ([one["id"] for one in second["items"]], second["next"]) == (ids[:1], None)


async def test_a_snapshot_says_what_it_holds(house: House) -> None:
    await fill(house)
    memory = await house.memory()
    told = await taken(house)
    assert (told["classes"], told["shots"]) == (3, 2)
    assert told["slots"] == sum(one["count"] for one in memory["dynamic"]["classes"])
    assert (told["epoch"], told["version"]) == (memory["epoch"], memory["version"])
    assert told["bytes"] == len(await house.exported())
    assert (await house.client.get(f"/admin/memory/snapshots/{told['id']}")).json() == told


async def test_a_snapshot_that_was_removed_is_unknown(house: House) -> None:
    path = f"/admin/memory/snapshots/{(await taken(house))['id']}"
    assert (await house.client.delete(path)).status_code == 204
    problem(await house.client.delete(path), "unknown-snapshot")
    problem(await house.client.get(path), "unknown-snapshot")
    problem(await house.client.post(f"{path}/restore"), "unknown-snapshot")


async def test_a_tenant_sees_its_own_snapshots_alone(house: House) -> None:
    await house.put("other")
    own = (await taken(house))["id"]
    assert await snapshots(house, "other") == []
    answer = await house.client.post(f"/admin/memory/snapshots/{own}/restore", headers={"X-Tenant": "other"})
    problem(answer, "unknown-snapshot")


# Export and import ----------------------------------------------------------------------------------------------------


async def test_an_exported_memory_answers_the_same_in_another_installation(build: Build) -> None:
    house, other = await build(), await build()
    await house.put()
    await fill(house)
    answer = await other.imported(await house.exported(), "moved")
    assert answer.status_code == 200, answer.text
    assert answer.json()["tenant"] == "moved"
    assert await answers(other, "moved") == await answers(house)
    assert await house.shots() == await other.shots("moved")


async def test_an_import_says_which_snapshot_brings_back_what_was_there(house: House) -> None:
    await house.put("other")
    await fill(house)
    before = await answers(house)
    saved = (await house.imported(await house.exported("other"))).json()["snapshot"]
    assert saved["reason"] == "import"
    await restored(house, saved["id"])
    assert await answers(house) == before


async def test_a_purged_slot_stays_barred_in_an_export(house: House) -> None:
    await house.predictions(IMAGES[0])
    (slot,) = await house.slots("red")
    await house.client.delete(f"/memory/dynamic/red/{slot['slot']}")
    assert (await house.imported(await house.exported())).status_code == 200
    assert await house.outcomes(IMAGES[0]) == ["rejected"]


async def test_the_images_of_shots_travel_along_where_they_are_kept(house: House) -> None:
    await house.put(retention="images")
    await fill(house)
    data = await house.exported()
    assert picture("red", 50) in data
    await house.imported(data, "moved")
    assert await house.exported("moved") != b""
    assert picture("red", 50) in await house.exported("moved")


async def hurt(data: bytes, how: str) -> bytes:
    if how == "cut":
        return data[: len(data) // 2]
    if how == "foreign":
        return b"PK\x03\x04" + data
    if how == "empty":
        return b""
    size = int.from_bytes(data[:8], "little")
    body = bytearray(data)
    if how == "sizes":
        body[:8] = (size + 2**40).to_bytes(8, "little")
        return bytes(body)
    at = len(data) - (len(data) - 8 - size) // 2
    assert how == "nan"
    body[at : at + 64] = b"\xff\x7f" * 32
    return bytes(body)


@pytest.mark.parametrize("how", ["cut", "foreign", "empty", "sizes", "nan"])
async def test_a_file_that_is_no_whole_memory_is_refused_and_nothing_changes(house: House, how: str) -> None:
    await fill(house)
    before, memory = await answers(house), await house.memory()
    answer = await house.imported(await hurt(await house.exported(), how))
    problem(answer, "invalid-request")
    assert await house.memory() == memory
    assert await answers(house) == before
    assert await snapshots(house) == []


async def test_a_memory_of_another_encoder_is_refused_with_what_differs(build: Build) -> None:
    house = await build()
    encoder = SoftEncoder()
    encoder.fingerprint, encoder.origin = "another", {"architecture": "fake", "weights": "another"}
    other = await build(encoder)
    await house.put()
    await fill(house)
    told = problem(await other.imported(await house.exported()), "fingerprint-mismatch")
    assert "weights" in told["detail"]
    assert "DMN_ENCODER" in told["detail"]
    assert (await other.memory())["static"]["classes"] == []


async def test_a_file_may_be_larger_than_any_other_body_but_not_without_limit(build: Build) -> None:
    house = await build(max_body_bytes=20_000, max_inflight_bytes=20_000, max_import_bytes=200_000)
    await house.put()
    for image in IMAGES:
        await house.predictions(image)
    data = await house.exported()
    small = await build(max_import_bytes=len(data) - 1)
    assert (await house.imported(data)).status_code == 200
    problem(await small.imported(data), "body-too-large")


async def test_a_tenant_that_is_not_there_cannot_be_exported(house: House) -> None:
    told = {"X-Tenant": "nobody"}
    problem(await house.client.get("/admin/memory/export", headers=told), "unknown-tenant")
    problem(await house.client.get("/admin/memory/snapshots", headers=told), "unknown-tenant")
    problem(await house.client.post("/admin/memory/snapshots", headers=told), "unknown-tenant")


# Bodies on their way --------------------------------------------------------------------------------------------------


class Slow:
    """A body whose second half comes when it is told to."""

    def __init__(self, data: bytes) -> None:
        self._data, self.begun, self.go_on = data, asyncio.Event(), asyncio.Event()

    async def parts(self) -> AsyncIterator[bytes]:
        yield self._data[: len(self._data) // 2]
        self.begun.set()
        await self.go_on.wait()
        yield self._data[len(self._data) // 2 :]


def importing(house: House, body: Slow, tenant: str) -> asyncio.Task[httpx.Response]:
    call = house.client.post("/admin/memory/import", content=body.parts(), headers={"X-Tenant": tenant})
    return asyncio.create_task(call)


async def test_whoever_sends_a_memory_slowly_keeps_nobody_out_but_itself(house: House) -> None:
    await house.put()
    data = await house.exported()
    body = Slow(data)
    slow = importing(house, body, "slow")
    await body.begun.wait()
    assert (await house.imported(data, "other")).status_code == 200
    refused = problem(await house.imported(data, "slow"), "queue-full")
    assert "of this tenant" in refused["detail"]
    body.go_on.set()
    assert (await slow).status_code == 200
    assert (await house.imported(data, "slow")).status_code == 200


async def test_memories_on_their_way_take_no_more_of_the_disk_together_than_one_may(build: Build) -> None:
    house = await build()
    await house.put()
    data = await house.exported()
    tight = await build(max_import_bytes=len(data) + len(data) // 4)
    body = Slow(data)
    first = importing(tight, body, "first")
    await body.begun.wait()
    problem(await tight.imported(data, "second"), "queue-full")
    body.go_on.set()
    assert (await first).status_code == 200
    assert (await tight.imported(data, "second")).status_code == 200
