"""From one encoder to the next while tenants are served: shadows that traffic fills, a switch, a way back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import Tensor

from core.encoders.protocol import Encoder
from core.memory.codec import decode_features
from service.background.shadow_queue import Shadows
from service.domain.memory import StoredMemory
from service.domain.tenant import shadow_of
from service.errors import FingerprintMismatch
from service.images.decode import develop
from service.images.limits import ImageLimits
from service.tenants import configuration
from service.tenants import migration as service_moving
from tests.support.fakes import picture
from tests.support.house import CLASSES, PATIENCE_S, House, Json, SoftEncoder, opened, problem
from tests.support.servers import BINARIES, server

OUTCOMES = ("learned", "late", "failed", "dropped")
NOW, THEN = "fake", "turned"
ASKED = [picture(colour, 900 + seed) for seed, colour in enumerate((*CLASSES, "yellow"))]
SHOP = {"X-Tenant": "shop"}


class Turned(SoftEncoder):
    """Has the same sight, told backwards: its features compare with each other, and with no other encoder's."""

    name = THEN

    def __init__(self) -> None:
        super().__init__()
        self.fingerprint = "turned-1"
        self.origin = {"architecture": "fake", "weights": "turned-1"}

    def encode_images(self, pixels: Tensor) -> Tensor:
        return super().encode_images(pixels).flip(1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return super().encode_texts(texts).flip(1)


@asynccontextmanager
async def moving(store: str = "memory", following: Encoder | None = None, **settings: Any) -> AsyncIterator[House]:
    """Open a house that has the next encoder beside its own."""
    async with opened(SoftEncoder(), following or Turned(), store=store, next_encoder=THEN, **settings) as house:
        yield house


@pytest_asyncio.fixture(loop_scope="session")
async def house() -> AsyncIterator[House]:
    async with moving() as one:
        assert (await one.put("shop", retention="images")).status_code == 201
        yield one


@pytest.fixture(params=[pytest.param("valkey", marks=pytest.mark.slow)])
def redis() -> Iterator[str]:
    if BINARIES["valkey"] is None:
        pytest.skip("no Valkey or Redis server is installed")
    with server(str(BINARIES["valkey"])) as running:
        yield running.url


def counts(house: House) -> dict[str, int]:
    """Return what became of images for the next encoder."""
    return {outcome: int(house.rooms.metrics.shadows.labels(outcome)._value.get()) for outcome in OUTCOMES}


async def reached(condition: Callable[[], bool]) -> None:
    """Return once something is so, which no event tells."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - as said
            await asyncio.sleep(0.01)


async def seen(house: House, images: int) -> None:
    """Return once so many images were dealt with."""
    await reached(lambda: sum(counts(house).values()) >= images)
    assert sum(counts(house).values()) == images


async def teach(house: House, images: int = 9, tenant: str = "shop", start: int = 0) -> list[bytes]:
    """Let a tenant learn some pictures, and wait until its shadow has seen them too."""
    before = sum(counts(house).values())
    pictures = [picture(CLASSES[seed % 3], seed) for seed in range(start, start + images)]
    for one in pictures:
        await house.predictions(one, tenant=tenant)
    await seen(house, before + images)
    return pictures


async def standing(house: House, tenant: str = "shop") -> Json:
    answer = await house.client.get("/admin/memory/migration", headers={"X-Tenant": tenant})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def job_of(house: House, tenant: str = "shop", **body: Any) -> Json:
    """Switch a tenant, and return the job once it is over."""
    who = {"X-Tenant": tenant}
    answer = await house.client.post("/admin/memory/migration", headers=who, json=body)
    assert answer.status_code == 202, answer.text
    job = dict(answer.json())
    async with asyncio.timeout(PATIENCE_S):
        while job["state"] in {"queued", "running"}:
            await asyncio.sleep(0.01)
            job = (await house.client.get(f"/jobs/{job['id']}", headers=who)).json()
    return job


async def switched(house: House, tenant: str = "shop", **body: Any) -> Json:
    """Switch a tenant, and return what the job says of it."""
    job = await job_of(house, tenant, **body)
    assert job["state"] == "done", job
    return dict(job["result"])


async def back(house: House, snapshot: str, tenant: str = "shop") -> None:
    answer = await house.client.post(f"/admin/memory/snapshots/{snapshot}/restore", headers={"X-Tenant": tenant})
    assert answer.status_code == 200, answer.text


async def answers(house: House, tenant: str = "shop") -> tuple[set[str], list[dict[str, float]]]:
    """Return which encoders answer some pictures that are not learned, and with which scores."""
    for rooms in house.rooms.beside or [house.rooms]:
        await rooms.archive.hand_in(tenant)  # what `auto` counted is then read as by whoever opens the memory anew
    told = [(await house.classify(one, tenant=tenant, learn=False)).json() for one in ASKED]
    scores = [{one["label"]: one["score"] for one in answer["predictions"][0]["top"]} for answer in told]
    return {answer["model"] for answer in told}, scores


def near(scores: list[dict[str, float]]) -> list[Any]:
    return [pytest.approx(own, abs=1e-5) for own in scores]


async def stored(house: House, name: str = "shop") -> StoredMemory:
    found = await house.rooms.store.load(name)
    assert found is not None
    return found


def slot_ids(memory: StoredMemory) -> set[str]:
    return {id_ for bank in memory.slots.values() for id_ in bank.ids}


def pixels(image: bytes) -> Tensor:
    limits = ImageLimits(max_bytes=1 << 20, max_pixels=1 << 20, formats=("PNG",))
    return develop(image, views=1, how=SoftEncoder.preprocess, limits=limits).pixels


def made_by(memory: StoredMemory, encoder: Encoder, pictures: Sequence[bytes]) -> bool:
    """Return whether every feature of a memory is what an encoder sees in one of the pictures."""
    known = torch.cat([encoder.encode_images(pixels(one)) for one in pictures])
    held = [bank.features for bank in memory.slots.values()]
    held += [shot.feature for own in memory.shots.values() for shot in own if shot.feature]
    features = decode_features(b"".join(held), encoder.dim).float()
    assert len(features)
    return bool(((features @ known.T).max(1).values > 0.999).all())


# The shadow -----------------------------------------------------------------------------------------------------------


async def test_traffic_fills_a_memory_under_the_next_encoder_and_answers_stay_as_they_are(house: House) -> None:
    async with opened(SoftEncoder()) as alone:
        await alone.put("shop")
        for seed in range(9):
            await alone.predictions(picture(CLASSES[seed % 3], seed), tenant="shop")
        models, scores = await answers(alone)
    pictures = await teach(house)
    assert counts(house)["learned"] == 9
    assert await answers(house) == (models, near(scores))
    main, shadow = await stored(house), await stored(house, shadow_of("shop"))
    assert slot_ids(main) == slot_ids(shadow)
    assert made_by(main, SoftEncoder(), pictures)
    assert made_by(shadow, Turned(), pictures)
    assert not made_by(shadow, SoftEncoder(), pictures)
    told = await standing(house)
    assert told == {
        "tenant": "shop",
        "encoder": NOW,
        "next": THEN,
        "memory": {"slots": 9, "shots": 0},
        "shadow": {"slots": 9, "shots": 0},
        "stranded": 0,
        "trained": False,
    }


async def test_no_metric_of_memories_counts_what_the_next_encoder_learns(house: House) -> None:
    await teach(house, 6)
    told = await house.metrics()
    assert sum(value for name, value in told.items() if name.startswith("dmn_memory_updates_total")) == 6
    assert told["dmn_memory_entropy_nats_count"] == 6
    assert told['dmn_shadow_images_total{outcome="learned"}'] == 6


async def test_gauges_tell_of_both_sets_of_rooms_together(house: House) -> None:
    await teach(house, 3)
    now, then = house.rooms.beside
    assert (await house.metrics())["dmn_hot_tenants"] == len(now.archive.tenants) + len(then.archive.tenants) == 2


async def test_no_caller_can_say_the_name_of_a_shadow_and_no_list_shows_it(house: House) -> None:
    await teach(house, 1)
    name = shadow_of("shop")
    problem(await house.classify(ASKED[0], tenant=name), "invalid-request")
    problem(await house.client.get("/memory", params={"tenant": name}), "invalid-request")
    for path in (f"/tenants/{name}", "/tenants/shop%2Fnext"):
        assert (await house.client.get(path)).status_code == 404
        assert (await house.client.put(path, json={"classes": []})).status_code == 404
        assert (await house.client.delete(path)).status_code == 404
    listed = (await house.client.get("/tenants")).json()["items"]
    assert [one["tenant"] for one in listed] == ["default", "shop"]


async def test_each_tenant_has_its_own_shadow(house: House) -> None:
    await house.put("other", retention="images")
    await teach(house, 3)
    await teach(house, 3, "other", start=50)
    for tenant in ("shop", "other"):
        assert slot_ids(await stored(house, shadow_of(tenant))) == slot_ids(await stored(house, tenant))
    assert not slot_ids(await stored(house, shadow_of("shop"))) & slot_ids(await stored(house, "other"))


async def test_what_does_not_learn_casts_no_shadow(house: House) -> None:
    await house.predictions(ASKED[0], tenant="shop", learn=False)
    await house.classify(b"no image", tenant="shop")
    await teach(house, 1)
    assert sum(counts(house).values()) == 1
    await house.put("shop", learn=False)
    await teach(house, 1, start=1)
    assert counts(house)["late"] == 1


async def test_classes_follow(house: House) -> None:
    await teach(house, 6)
    await house.client.post("/tenants/shop/classes", json={"classes": ["yellow"]})
    await house.client.delete("/tenants/shop/classes/red")
    await teach(house, 1, start=7)
    shadow = await stored(house, shadow_of("shop"))
    assert [spec.name for spec in shadow.record.config.classes] == ["green", "blue", "yellow"]
    assert shadow.record.config == (await stored(house)).record.config
    assert set(shadow.slots) <= {spec.id for spec in shadow.record.config.classes}


async def test_shots_whose_images_are_kept_come_along_and_go_along(house: House) -> None:
    await house.upload("red", picture("red", 70), picture("red", 71), tenant="shop")
    await teach(house, 1)
    shots = {one["id"] for one in await house.shots("shop")}
    shadow = await stored(house, shadow_of("shop"))
    assert {shot.id for own in shadow.shots.values() for shot in own} == shots
    assert made_by(shadow, Turned(), [picture("red", 70), picture("red", 71), picture("red", 0)])
    assert all(shot.kept == 0 for own in shadow.shots.values() for shot in own)
    (late,) = (await house.upload("blue", picture("blue", 72), tenant="shop")).json()["shots"]
    await house.client.delete(f"/memory/static/{min(shots)}", headers=SHOP)
    result = await switched(house)
    assert result["shots"] == 2
    assert {one["id"] for one in await house.shots("shop")} == {max(shots), late["id"]}
    assert all(shot.kept for own in (await stored(house)).shots.values() for shot in own)


async def test_a_reset_empties_the_shadow_too(house: House) -> None:
    await teach(house, 6)
    await house.reset("dynamic", "shop", ["red"])
    by_name = {spec.name: spec.id for spec in (await stored(house)).record.config.classes}
    left = (await stored(house, shadow_of("shop"))).slots
    assert not left.get(by_name["red"])
    assert left[by_name["green"]]
    await house.reset("all", "shop")
    assert (await standing(house))["shadow"] == {"slots": 0, "shots": 0}


async def test_a_purged_slot_leaves_the_shadow_too(house: House) -> None:
    await teach(house, 6)
    gone = (await house.slots("red", "shop"))[0]["slot"]
    await house.client.delete(f"/memory/dynamic/red/{gone}", headers=SHOP)
    assert gone not in slot_ids(await stored(house, shadow_of("shop")))
    await switched(house)
    assert gone not in slot_ids(await stored(house))
    again = [await house.outcomes(picture(CLASSES[seed % 3], seed), tenant="shop") for seed in range(6)]
    assert sorted(outcome for (outcome,) in again) == ["duplicate"] * 5 + ["rejected"]
    assert ["rejected"] in again[::3]  # the red ones


@asynccontextmanager
async def held(house: House) -> AsyncIterator[Shadows]:
    """Keep the shadow of `shop` from learning; what it is shown waits, and callers do not."""
    shadows = house.rooms.shadows
    assert shadows is not None
    async with house.rooms.beside[1].archive.exclusive(shadow_of("shop")):
        yield shadows


@pytest.mark.parametrize("how", ["purge", "reset", "delete"])
async def test_an_image_that_waits_or_is_under_way_does_not_bring_back_what_was_taken_out(
    house: House, how: str
) -> None:
    await teach(house, 1)
    async with held(house) as shadows:
        (one,) = await house.predictions(picture("green", 1), tenant="shop")
        await reached(lambda: not shadows.nbytes)
        (two,) = await house.predictions(picture("green", 4), tenant="shop")
        assert shadows.nbytes
        gone = {one["learned"]["slot"], two["learned"]["slot"]}
        if how == "reset":
            await house.reset("dynamic", "shop")
        elif how == "delete":
            await house.client.delete("/tenants/shop")
        for slot in gone if how == "purge" else ():
            assert (await house.client.delete(f"/memory/dynamic/green/{slot}", headers=SHOP)).status_code == 204
    await seen(house, 3)
    shadow = await house.rooms.store.load(shadow_of("shop"))
    if how == "delete":
        assert shadow is None
    else:
        assert shadow is not None
        assert not gone & slot_ids(shadow)


async def test_deleting_a_tenant_deletes_its_shadow(redis: str) -> None:
    async with moving(redis) as house:
        await house.put("shop", retention="images")
        await teach(house, 3)
        assert await house.rooms.store.get(shadow_of("shop")) is not None
        await house.client.delete("/tenants/shop")
        assert await house.rooms.store.get(shadow_of("shop")) is None
    async with opened(SoftEncoder(), store=redis) as house:
        assert [one["tenant"] for one in (await house.client.get("/tenants")).json()["items"]] == ["default"]


async def test_a_shadow_that_nobody_wants_can_be_dropped_also_where_there_is_no_next_encoder(redis: str) -> None:
    async with moving(redis) as house:
        await house.put("shop", retention="images")
        await teach(house, 3)
    async with opened(SoftEncoder(), store=redis) as house:
        told = await standing(house)
        assert (told["next"], told["shadow"]) == (None, {"slots": 3, "shots": 0})
        problem(await house.client.post("/admin/memory/migration", headers=SHOP), "fingerprint-mismatch")
        assert (await house.client.delete("/admin/memory/migration", headers=SHOP)).status_code == 204
        assert (await standing(house))["shadow"] is None
        problem(await house.client.delete("/admin/memory/migration", headers={"X-Tenant": "nobody"}), "unknown-tenant")


async def test_callers_do_not_wait_for_shadows_and_these_are_dropped_when_too_many_wait() -> None:
    size = max(len(picture("red", seed)) for seed in range(9)) + 1024
    async with moving(next_queue_bytes=3 * size) as house:
        await house.put("shop")
        await teach(house, 1)
        async with held(house) as shadows:
            await house.predictions(picture("red", 1), tenant="shop")
            await reached(lambda: not shadows.nbytes)
            for seed in range(2, 9):
                await house.predictions(picture("red", seed), tenant="shop")
                assert shadows.nbytes <= 3 * size
            assert counts(house)["dropped"] == 4
        await seen(house, 9)
        assert counts(house) == {"learned": 5, "late": 0, "failed": 0, "dropped": 4}


# The switch -----------------------------------------------------------------------------------------------------------


async def test_after_the_switch_answers_are_those_of_a_service_that_always_had_that_encoder(house: House) -> None:
    async with opened(Turned()) as alone:
        await alone.put("shop", retention="images")
        for seed in range(9):
            await alone.predictions(picture(CLASSES[seed % 3], seed), tenant="shop")
        await alone.upload("red", picture("red", 70), tenant="shop")
        models, scores = await answers(alone)
    pictures = await teach(house)
    await house.upload("red", picture("red", 70), tenant="shop")
    result = await switched(house)
    assert (result["encoder"], result["slots"], result["shots"]) == (THEN, 9, 1)
    assert await answers(house) == (models, near(scores))
    assert made_by(await stored(house), Turned(), [*pictures, picture("red", 70)])
    assert (await standing(house))["next"] is None
    assert (await standing(house))["shadow"] is None
    assert (await house.memory("shop"))["fingerprint"] == "turned-1"


async def test_a_switched_tenant_lives_on_and_its_traffic_casts_no_shadow(house: House) -> None:
    await teach(house, 3)
    await switched(house)
    assert await house.outcomes(picture("red", 30), tenant="shop") == ["filled"]
    assert (await house.upload("red", picture("red", 70), tenant="shop")).status_code == 201
    assert (await house.client.post("/tenants/shop/classes", json={"classes": ["white"]})).status_code == 201
    assert (await house.put("shop", retention="images", slots=7)).status_code == 200
    memory = await stored(house)
    assert memory.record.fingerprint == "turned-1"
    assert len(slot_ids(memory)) == 4
    assert sum(counts(house).values()) == 3
    assert await house.rooms.store.get(shadow_of("shop")) is None
    problem(await house.client.post("/admin/memory/migration", headers=SHOP), "fingerprint-mismatch")


async def test_the_snapshot_from_before_is_the_way_back_and_the_one_after_it_the_way_there_again(house: House) -> None:
    await teach(house)
    before, bank = await answers(house), await house.banks("shop")
    result = await switched(house)
    after = await answers(house)
    assert after[0] == {THEN}
    await back(house, result["snapshot"])
    assert await house.banks("shop") == bank
    models, scores = await answers(house)
    assert (models, scores) == ({NOW}, near(before[1]))
    restored = (await house.client.get("/admin/memory/snapshots", headers=SHOP)).json()["items"][0]
    await teach(house, 1, start=20)
    assert (await standing(house))["shadow"] == {"slots": 1, "shots": 0}
    await back(house, restored["id"])
    assert (await answers(house))[0] == {THEN}
    assert await house.rooms.store.get(shadow_of("shop")) is None


async def test_a_tenant_without_traffic_or_classes_can_be_switched_and_come_back(house: House) -> None:
    for tenant in ("shop", "default"):
        result = await switched(house, tenant)
        assert (result["slots"], result["shots"]) == (0, 0)
        assert (await house.memory(tenant))["fingerprint"] == "turned-1"
        await back(house, result["snapshot"], tenant)
        assert (await house.memory(tenant))["fingerprint"] == "fake-1"


async def test_shots_without_an_image_are_not_lost_unless_that_is_said(house: House) -> None:
    await house.put("other")
    await house.upload("red", picture("red", 70), picture("red", 71), tenant="other")
    who = {"X-Tenant": "other"}
    assert (await standing(house, "other"))["stranded"] == 2
    told = problem(await house.client.post("/admin/memory/migration", headers=who), "invalid-request")
    assert told["detail"].startswith("2 shots of 'other' have no kept image")
    assert (await house.memory("other"))["fingerprint"] == "fake-1"
    result = await switched(house, "other", force=True)
    assert result["shots"] == 0
    await back(house, result["snapshot"], "other")
    assert len(await house.shots("other")) == 2


async def test_a_configuration_that_comes_a_moment_too_late_empties_nothing(house: House) -> None:
    """A PUT finds out in whose rooms it is before it changes anything; a switch in between must not undo itself."""
    await teach(house, 3)
    config = (await stored(house)).record.config
    await switched(house)
    with pytest.raises(FingerprintMismatch):
        await configuration.put_tenant(house.rooms, "shop", config)
    assert len(slot_ids(await stored(house))) == 3


async def test_a_service_without_the_next_encoder_refuses_a_switched_tenant(redis: str) -> None:
    async with moving(redis) as house, opened(SoftEncoder(), store=redis, sync_ms=0) as older:
        await house.put("shop", retention="images")
        await teach(house, 3)
        assert (await older.classify(ASKED[0], tenant="shop")).status_code == 200
        await switched(house)
        answer = await older.classify(ASKED[0], tenant="shop")
        problem(answer, "fingerprint-mismatch")
        assert slot_ids(await stored(house)) == slot_ids(await stored(older))


async def test_an_encoder_that_gives_the_same_features_is_no_next_one() -> None:
    with pytest.raises(ValueError, match="the same features"):
        async with moving(following=SoftEncoder()):
            pass


# Under traffic --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stream:
    """One client that sends pictures one after the other, and what it is told."""

    house: House
    start: int
    tenant: str = "shop"
    told: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    async def run(self, stop: asyncio.Event) -> None:
        seed = self.start
        while not stop.is_set():
            answer = await self.house.classify(picture(CLASSES[seed % 3], seed), tenant=self.tenant)
            if answer.status_code == 200 and answer.json()["predictions"][0]["error"] is None:
                self.told.append(answer.json()["model"])
            else:
                self.failed.append(answer.text)
            seed += 1

    async def hears(self, model: str, times: int = 10) -> None:
        """Return once it was answered so often by an encoder from now on."""
        begin = len(self.told)
        await reached(lambda: bool(self.failed) or self.told[begin:].count(model) >= times)

    @property
    def turns(self) -> list[str]:
        """Which encoders answered, in order, one after the other."""
        return [model for at, model in enumerate(self.told) if not at or self.told[at - 1] != model]


async def test_no_call_fails_and_nothing_mixes_when_a_tenant_is_switched_there_and_back_under_traffic(
    redis: str,
) -> None:
    async with moving(redis) as one, moving(redis) as two:
        for tenant in ("shop", "other"):
            await one.put(tenant, retention="images", slots=5)
        streams = [Stream(house, 1000 * at) for at, house in enumerate((one, one, two, two))]
        others = [Stream(one, 5000, "other"), Stream(two, 6000, "other")]
        stop = asyncio.Event()
        sending = [asyncio.create_task(stream.run(stop)) for stream in (*streams, *others)]
        for stream in streams:
            await stream.hears(NOW)
        result = await switched(one)
        for stream in streams:
            await stream.hears(THEN)
        between = await stored(two)
        await back(two, result["snapshot"])
        for stream in streams:
            await stream.hears(NOW)
        stop.set()
        await asyncio.gather(*sending)
        assert [text for stream in (*streams, *others) for text in stream.failed] == []
        assert {tuple(stream.turns) for stream in streams} == {(NOW, THEN, NOW)}
        assert {tuple(stream.turns) for stream in others} == {(NOW,)}
        pictures = [
            picture(CLASSES[seed % 3], seed)
            for stream in streams
            for seed in range(stream.start, stream.start + len(stream.told))
        ]
        assert made_by(between, Turned(), pictures)
        assert made_by(await stored(one), SoftEncoder(), pictures)


async def test_no_shot_that_was_uploaded_across_the_switch_is_lost(redis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_moving, "_TRIES", 10_000)  # until it once finds the shots as it has just read them
    async with moving(redis) as one, moving(redis) as two:
        await one.put("shop", retention="images", method="dmn")
        await one.upload("red", picture("red", 70), tenant="shop")
        stop, ids, refused = asyncio.Event(), [], []

        async def upload(house: House, seed: int) -> None:
            while not stop.is_set():
                answer = await house.upload("blue", picture("blue", seed), tenant="shop")
                if answer.status_code == 201:
                    ids.append(answer.json()["shots"][0]["id"])
                else:
                    refused.append(answer.text)
                seed += 1
                await asyncio.sleep(0.05)

        sending = [asyncio.create_task(upload(house, 1000 * at)) for at, house in enumerate((one, two), 1)]
        await reached(lambda: len(ids) >= 4)
        job = await job_of(one)
        held = len(ids)
        await reached(lambda: len(ids) >= held + 4)
        stop.set()
        await asyncio.gather(*sending)
        assert refused == []
        assert set(ids) < {shot["id"] for shot in await one.shots("shop")}
        assert job["state"] == "done", job
