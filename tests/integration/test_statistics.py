"""Class statistics through the whole service: counted once, shared, kept, moved, and gone when they should be."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from service.domain.memory import StoredStatistics
from service.errors import StoreAway
from service.services import Rooms
from service.settings import DEFAULT_TENANT, Settings
from service.stores.embedded.binary import find_binary
from service.tenants import configuration
from service.wiring import open_rooms
from tests.integration.test_stores import ask, name_classes
from tests.support.fakes import FakeEncoder, picture
from tests.support.house import CLASSES, Build, House, problem

TENANT = {"X-Tenant": DEFAULT_TENANT}
STREAM = [picture(colour, seed) for seed in range(6) for colour in CLASSES]


async def statistics(rooms: Rooms, tenant: str = DEFAULT_TENANT) -> StoredStatistics:
    """Return what is counted, once what is on its way is written."""
    await rooms.archive.exchange(tenant)
    return (await configuration.load(rooms, tenant)).statistics


async def images(rooms: Rooms, tenant: str = DEFAULT_TENANT) -> float:
    """Return how many images were counted."""
    shared = (await statistics(rooms, tenant)).shared
    return float(struct.unpack_from("<f", shared)[0]) if shared else 0.0


async def asked(house: House) -> dict[str, Any]:
    """Return what an image is answered that neither learns nor counts."""
    (told,) = await house.predictions(picture("red", 99), learn="false")
    return told


# What is counted ------------------------------------------------------------------------------------------------------


async def test_each_image_is_counted_once(house: House) -> None:
    await house.predictions(STREAM[0], STREAM[1], STREAM[0])
    assert await images(house.rooms) == 2.0
    await house.predictions(STREAM[1], STREAM[2])
    assert await images(house.rooms) == 3.0


async def test_who_does_not_learn_is_not_counted(house: House) -> None:
    await house.predictions(*STREAM, learn="false")
    assert await images(house.rooms) == 0.0
    await house.put(learn=False)
    await house.predictions(*STREAM)
    assert await images(house.rooms) == 0.0


async def test_a_purged_image_is_not_counted_again(house: House) -> None:
    (told,) = await house.predictions(STREAM[0])
    slot = told["learned"]["slot"]
    answer = await house.client.delete(f"/memory/dynamic/red/{slot}", headers=TENANT)
    assert answer.status_code == 204, answer.text
    house.rooms.archive.drop(DEFAULT_TENANT)
    await house.predictions(STREAM[0])
    assert await images(house.rooms) == 1.0


async def test_what_was_counted_changes_answers(house: House) -> None:
    before = await asked(house)
    await house.predictions(*STREAM)
    after = await asked(house)
    assert after["readouts"]["statistics"] != before["readouts"]["statistics"]


async def test_with_dmn_nothing_is_counted_and_the_answer_is_that_of_the_paper(house: House) -> None:
    assert (await house.put(method="dmn")).status_code == 200
    await house.predictions(*STREAM)
    told = await asked(house)
    assert told["readouts"]["statistics"] is None
    assert await images(house.rooms) == 0.0
    reading = await ask(house.rooms, picture("red", 99), learn=False)
    weights = (await house.rooms.archive.record(DEFAULT_TENANT)).config.weights
    assert reading.text.label == reading.dynamic.label == told["label"]
    wanted = (weights[0] * reading.text.score + weights[1] * reading.dynamic.score) / (weights[0] + weights[1])
    assert reading.fused.score == pytest.approx(wanted)
    assert told["score"] == pytest.approx(wanted)


# When labels change ---------------------------------------------------------------------------------------------------


async def test_an_uploaded_shot_has_slots_scored_anew_and_the_answer_names_the_epoch_after_it(house: House) -> None:
    await house.predictions(*STREAM)
    before = await house.rooms.archive.record(DEFAULT_TENANT)
    answer = await house.upload("red", picture("yellow", 1))
    after = await house.rooms.archive.record(DEFAULT_TENANT)
    assert after.labelling == after.due_labelling != before.labelling
    assert after.life != before.life
    assert after.stamp.epoch > before.stamp.epoch
    told = answer.json()["memory"]
    assert told["epoch"] == after.stamp.epoch
    slots = sum(map(len, (await configuration.load(house.rooms, DEFAULT_TENANT)).slots.values()))
    assert await images(house.rooms) == float(slots)


async def test_with_dmn_a_shot_labels_nothing(house: House) -> None:
    await house.put(method="dmn")
    await house.predictions(*STREAM)
    before = await house.rooms.archive.record(DEFAULT_TENANT)
    await house.upload("red", picture("yellow", 1))
    assert (await house.rooms.archive.record(DEFAULT_TENANT)).stamp.epoch == before.stamp.epoch


@pytest.mark.parametrize("how", ["reset", "delete", "put"])
async def test_what_is_on_its_way_when_a_tenant_is_emptied_does_not_come_back(house: House, how: str) -> None:
    await house.predictions(*STREAM[:3])
    await house.rooms.archive.exchange(DEFAULT_TENANT)
    await house.predictions(*STREAM[3:])
    if how == "reset":
        await house.reset("dynamic")
    elif how == "delete":
        await house.client.delete(f"/tenants/{DEFAULT_TENANT}")
        await house.put()
    else:
        await house.put(classes=["red", "yellow"])
    before = await images(house.rooms)
    await house.rooms.archive.settle(everything=True)
    assert await images(house.rooms) == before < len(STREAM)


# Where the store is away ----------------------------------------------------------------------------------------------


async def _away(*_: object) -> int:
    raise StoreAway("The store does not answer.")


@pytest.mark.parametrize("dropped", [False, True])
async def test_counting_goes_on_while_the_store_is_away_and_is_written_when_it_is_back(
    build: Build, monkeypatch: pytest.MonkeyPatch, *, dropped: bool
) -> None:
    house = await build(housekeeping=False)
    await house.put()
    monkeypatch.setattr(house.rooms.store, "count", _away)
    await house.predictions(*STREAM[:9])
    with pytest.raises(StoreAway):
        await house.rooms.archive.exchange(DEFAULT_TENANT)
    await house.predictions(*STREAM[9:])
    if dropped:
        house.rooms.archive.drop(DEFAULT_TENANT)
    await house.rooms.archive.settle()
    monkeypatch.undo()
    await house.rooms.archive.settle()
    assert await images(house.rooms) == float(len(STREAM))


# On the move ----------------------------------------------------------------------------------------------------------


async def test_export_and_import_carry_them(house: House) -> None:
    await house.predictions(*STREAM)
    body = await house.exported()
    answer = await house.imported(body, "other")
    assert answer.status_code in (200, 201), answer.text
    assert await statistics(house.rooms, "other") == await statistics(house.rooms)
    (here,) = await house.predictions(picture("red", 99), learn="false")
    (there,) = await house.predictions(picture("red", 99), learn="false", tenant="other")
    assert there["readouts"] == here["readouts"]


async def test_a_file_without_them_begins_with_none(house: House) -> None:
    body = await house.exported()
    await house.predictions(*STREAM)
    answer = await house.imported(body, DEFAULT_TENANT)
    assert answer.status_code in (200, 201), answer.text
    assert await images(house.rooms) == 0.0


async def test_statistics_of_which_every_class_was_emptied_can_be_moved_all_the_same(house: House) -> None:
    await house.predictions(*STREAM)
    await house.rooms.archive.exchange(DEFAULT_TENANT)
    await house.reset("dynamic", classes=CLASSES)
    before = await statistics(house.rooms)
    assert not before.rows
    assert before.shared
    answer = await house.imported(await house.exported(), "other")
    assert answer.status_code in (200, 201), answer.text
    assert await statistics(house.rooms, "other") == before


async def test_a_snapshot_brings_them_back(house: House) -> None:
    await house.predictions(*STREAM[:9])
    answer = await house.client.post("/admin/memory/snapshots", headers=TENANT)
    assert answer.status_code == 201, answer.text
    before = await statistics(house.rooms)
    told = await asked(house)
    await house.predictions(*STREAM[9:])
    await house.reset("dynamic")
    answer = await house.client.post(f"/admin/memory/snapshots/{answer.json()['id']}/restore", headers=TENANT)
    assert answer.status_code == 200, answer.text
    assert await statistics(house.rooms) == before
    assert (await asked(house))["readouts"] == told["readouts"]


def _columns(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def spoilt(body: bytes) -> bytes:
        size = struct.unpack_from("<Q", body)[0]
        metadata = json.loads(body[8 : 8 + size])["__metadata__"]
        columns = {name: column.copy() for name, column in load(body).items()}
        change(columns)
        return save(columns, metadata)

    return spoilt


def _entry(column: str, at: Any, value: float) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[column][at] = value

    return change


def _cut(column: str, what: Any) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[column] = np.ascontiguousarray(columns[column][what])

    return change


def _without(column: str) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        del columns[column]

    return change


DIM = FakeEncoder.dim
HOSTILE = {
    "a row that is no number": _entry("statistics.rows", (0, 3), np.nan),
    "an infinite sum": _entry("statistics.shared", 5, np.inf),
    "a count below zero": _entry("statistics.rows", (1, 0), -1.0),
    "fewer than no images": _entry("statistics.shared", 0, -1.0),
    "rows too short": _cut("statistics.rows", (slice(None), slice(0, -1))),
    "rows without entries": _cut("statistics.rows", (slice(None), slice(0, 0))),
    "too few of no class": _cut("statistics.shared", slice(0, -1)),
    "fewer rows than classes": _cut("statistics.rows", slice(0, -1)),
    "a class twice": _entry("statistics.classes", 1, 0),
    "a class that is not there": _entry("statistics.classes", 2, 7),
    "no classes": _without("statistics.classes"),
    "no rows": _without("statistics.rows"),
    "nothing of no class": _without("statistics.shared"),
    "agreement below nothing": _entry("statistics.shared", -2, -5.0),
    "a square below zero": _entry("statistics.shared", 1 + DIM, -1.0),
    "a square larger than all images": _entry("statistics.shared", 1 + DIM, 1e6),
    "a class larger than all images": _entry("statistics.rows", (0, 0), 1e6),
    "a sum larger than its class": _entry("statistics.rows", (0, 1), 1e6),
}


@pytest.mark.parametrize("what", list(HOSTILE))
async def test_hostile_statistics_are_refused_and_change_nothing(house: House, what: str) -> None:
    await house.predictions(*STREAM)
    body = await house.exported()
    before = await configuration.load(house.rooms, DEFAULT_TENANT)
    answer = await house.imported(_columns(HOSTILE[what])(body), DEFAULT_TENANT)
    problem(answer, "invalid-request")
    assert await configuration.load(house.rooms, DEFAULT_TENANT) == before


# Two services on one server -------------------------------------------------------------------------------------------

served = pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed")


def rooms_on(folder: Path) -> Any:
    """Open a service; a server that stands still for a while is not taken for one that is away."""
    return open_rooms(Settings(store="embedded", data_dir=folder, sync_ms=0, store_timeout_ms=60_000), FakeEncoder())


@served
async def test_what_one_service_counted_changes_the_answer_of_another_after_the_exchange(tmp_path: Path) -> None:
    async with rooms_on(tmp_path) as one, rooms_on(tmp_path) as other:
        await name_classes(one)
        query = picture("red", 99)
        before = await ask(other, query, learn=False)
        for image in STREAM:
            await ask(one, image)
        await one.archive.exchange(DEFAULT_TENANT)
        await other.archive.exchange(DEFAULT_TENANT)
        after = await ask(other, query, learn=False)
        here = await ask(one, query, learn=False)
    assert before.statistics is not None
    assert after.statistics is not None
    assert here.statistics is not None
    assert after.probabilities.tolist() != before.probabilities.tolist()
    assert after.probabilities.tolist() == pytest.approx(here.probabilities.tolist(), abs=0.05)


@served
async def test_what_two_services_counted_is_the_sum_of_both(tmp_path: Path) -> None:
    async with rooms_on(tmp_path) as one, rooms_on(tmp_path) as other:
        await name_classes(one)
        for at, image in enumerate(STREAM):
            await ask((one, other)[at % 2], image)
        await one.archive.exchange(DEFAULT_TENANT)
        assert await images(other) == float(len(STREAM))


@served
async def test_a_restart_keeps_them_and_writes_what_was_on_its_way(tmp_path: Path) -> None:
    async with rooms_on(tmp_path) as rooms:
        await name_classes(rooms)
        for image in STREAM:
            await ask(rooms, image)
    async with rooms_on(tmp_path) as rooms:
        assert await images(rooms) == float(len(STREAM))
        for image in STREAM[:3]:
            await ask(rooms, image, learn=False)
        assert await images(rooms) == float(len(STREAM))
