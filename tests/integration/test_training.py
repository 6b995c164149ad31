"""Few-shot training over HTTP: a job that ends in other answers, or leaves everything as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from service.services import Rooms
from service.tenants import training
from tests.support.fakes import picture
from tests.support.house import CLASSES, PATIENCE_S, Build, House, SoftEncoder, problem, until

FAST = {"epochs": 5, "learning_rate": 0.01}


async def taught(house: House, shots: int = 4, **config: Any) -> House:
    """Give the default tenant shots of every class, under names that say nothing of the colours."""
    names = [f"kind {at}" for at in range(len(CLASSES))]
    assert (await house.put(classes=names, **config)).status_code in (200, 201)
    for at, colour in enumerate(CLASSES):
        answer = await house.upload(names[at], *(picture(colour, seed) for seed in range(shots)))
        assert answer.status_code == 201, answer.text
    return house


@pytest_asyncio.fixture(loop_scope="session")
async def school(house: House) -> House:
    return await taught(house)


async def start(house: House, **options: Any) -> dict[str, Any]:
    answer = await house.client.post("/memory/static/train", json=options or FAST)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert job["kind"] == "train"
    return job


async def job_of(house: House, id_: str) -> dict[str, Any]:
    answer = await house.client.get(f"/jobs/{id_}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def ended(house: House, id_: str) -> dict[str, Any]:
    await house.rooms.jobs.wait(id_, 6 * PATIENCE_S)
    return await job_of(house, id_)


async def trained(house: House, **options: Any) -> dict[str, Any]:
    job = await ended(house, (await start(house, **options))["id"])
    assert job["state"] == "done", job
    return job


class Lesson:
    """Holds a training before its n-th step until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self._left, self._real = at, training._let_pass
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()
        monkeypatch.setattr(training, "_let_pass", self)

    async def __call__(self, rooms: Rooms, spent: float) -> None:
        self._left -= 1
        if not self._left:
            self.reached.set()
            await self.go_on.wait()
        await self._real(rooms, spent)


@pytest_asyncio.fixture(loop_scope="session")
async def held(school: House, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[House, Lesson]]:
    """Yield a house and a lesson that stands before its fourth step."""
    lesson = Lesson(monkeypatch, at=4)
    yield school, lesson
    lesson.go_on.set()


async def reached(lesson: Lesson) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await lesson.reached.wait()


# What it does ---------------------------------------------------------------------------------------------------------


async def test_training_changes_the_answers_and_says_what_it_was_worth(school: House) -> None:
    await school.classify(*(picture(colour, 50) for colour in CLASSES))
    before, memory = await school.predictions(picture("red", 99), learn=False), await school.memory()
    assert memory["projections"] is None
    job = await trained(school)
    result = job["result"]
    assert result["trained"] is True
    assert 1 <= result["epochs"] == len(result["losses"]) <= 5
    assert set(result["held_out"]["before"]) == set(result["held_out"]["after"]) == {"text", "static", "fused"}
    after = await school.memory()
    assert after["projections"] == {
        "id": result["id"],
        "trained": after["projections"]["trained"],
        "epochs": result["epochs"],
        "shots": 12,
        "held_out": result["held_out"],
        "classes": 3,
    }
    assert after["epoch"] > memory["epoch"]
    assert after["bytes"] == memory["bytes"] + 4 * 5 * 3 * SoftEncoder.dim
    answer = (await school.predictions(picture("red", 99), learn=False))[0]
    assert answer["readouts"]["text"] != before[0]["readouts"]["text"]


async def test_a_training_without_a_body_takes_the_defaults(school: House) -> None:
    answer = await school.client.post("/memory/static/train")
    assert answer.status_code == 202
    job = await ended(school, answer.json()["id"])
    assert job["result"]["learning_rate"] == pytest.approx(1e-4 * 100 / SoftEncoder.logit_scale)


async def test_the_same_seed_gives_the_same_offsets(school: House) -> None:
    first, second = await trained(school), await trained(school)
    assert first["result"] == second["result"]
    other = await trained(school, **FAST, seed=5)
    assert other["result"]["id"] != first["result"]["id"]


async def test_stored_slots_are_scored_under_the_offsets_when_it_is_done(school: House) -> None:
    await school.classify(*(picture(colour, 50) for colour in CLASSES))
    await trained(school)
    record = await school.rooms.store.get("default")
    assert record is not None
    assert record.labelling == record.due_labelling
    told = (await school.classify(picture("red", 99), learn=False)).json()
    assert told["memory"]["state"] == "fresh"


async def test_images_that_are_kept_are_trained_on_by_crops(build: Build) -> None:
    house = await taught(await build(housekeeping=False), retention="images")
    before = house.rooms.encoder.images  # type: ignore[attr-defined]
    with_images = await trained(house)
    assert house.rooms.encoder.images - before == 5 * 12  # type: ignore[attr-defined]
    without = await trained(await taught(await build(housekeeping=False)))
    assert with_images["result"]["losses"] != without["result"]["losses"]


async def test_offsets_are_removed_on_demand_and_slots_scored_without_them(school: House) -> None:
    await school.classify(*(picture(colour, 50) for colour in CLASSES))
    banks, asked = await school.banks(), await school.predictions(picture("red", 99), learn=False)
    await trained(school)
    answer = await school.client.delete("/memory/static/train")
    assert answer.status_code == 204
    assert (await school.memory())["projections"] is None
    entropies = {slot["slot"]: slot["entropy"] for bank in banks.values() for slot in bank}
    found = {slot["slot"]: slot["entropy"] for bank in (await school.banks()).values() for slot in bank}
    assert found == pytest.approx(entropies, abs=1e-3)
    again = await school.predictions(picture("red", 99), learn=False)
    assert again[0]["readouts"]["text"] == asked[0]["readouts"]["text"]


async def test_a_snapshot_from_before_the_training_undoes_it(school: House) -> None:
    await trained(school)
    listed = (await school.client.get("/admin/memory/snapshots")).json()["items"]
    assert listed[0]["reason"] == "training"
    restored = await school.client.post(f"/admin/memory/snapshots/{listed[0]['id']}/restore")
    assert restored.status_code == 200
    assert (await school.memory())["projections"] is None


async def test_an_exported_memory_brings_its_offsets_along(school: House) -> None:
    await trained(school)
    told = (await school.memory())["projections"]
    file = (await school.client.get("/admin/memory/export")).content
    answer = await school.client.post("/admin/memory/import", content=file, headers={"X-Tenant": "other"})
    assert answer.status_code == 200, answer.text
    assert (await school.memory("other"))["projections"] == told


@pytest.mark.parametrize(("scope", "gone"), [("static", True), ("all", True), ("dynamic", False)])
async def test_a_reset_of_the_shots_takes_the_offsets_along(school: House, scope: str, *, gone: bool) -> None:
    await trained(school)
    await school.reset(scope)
    assert ((await school.memory())["projections"] is None) == gone


async def test_a_reset_of_one_class_leaves_the_offsets(school: House) -> None:
    await trained(school)
    await school.reset("static", classes=["kind 1"])
    assert (await school.memory())["projections"] is not None


# Its life as a job ----------------------------------------------------------------------------------------------------


async def test_a_running_training_tells_pass_loss_accuracy_and_time(held: tuple[House, Lesson]) -> None:
    house, lesson = held
    id_ = (await start(house))["id"]
    await reached(lesson)
    job = await job_of(house, id_)
    assert job["state"] == "running"
    assert 0 < job["progress"] < 1
    assert job["eta_s"] is not None
    assert {"phase", "epoch", "epochs", "loss", "held_out_accuracy"} == set(job["result"])
    assert (job["result"]["phase"], job["result"]["epoch"]) == ("held-out", 3)
    lesson.go_on.set()
    assert (await ended(house, id_))["state"] == "done"


async def test_a_cancelled_training_leaves_everything_as_it_was(held: tuple[House, Lesson]) -> None:
    house, lesson = held
    before = await house.memory()
    id_ = (await start(house))["id"]
    await reached(lesson)
    assert (await house.client.delete(f"/jobs/{id_}")).status_code == 204
    job = await job_of(house, id_)
    assert (job["state"], job["result"]) == ("cancelled", None)
    assert await house.memory() == before
    assert not house.rooms.tutor.locked()


@pytest.mark.parametrize("at", ["_swap", "_rescore"])
async def test_who_cancels_at_the_last_moment_gets_the_former_offsets_back(
    school: House, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    await school.classify(*(picture(colour, 50) for colour in CLASSES))
    await trained(school)
    before, banks = await school.memory(), await school.banks()
    real, reached_, go_on = getattr(training, at), asyncio.Event(), asyncio.Event()

    async def slow(*args: Any) -> Any:
        done = await real(*args)
        if not reached_.is_set():
            reached_.set()
            await go_on.wait()
        return done

    monkeypatch.setattr(training, at, slow)
    id_ = (await start(school, **FAST, seed=9))["id"]
    async with asyncio.timeout(PATIENCE_S):
        await reached_.wait()
    assert (await school.memory())["projections"] != before["projections"]
    cancelling, task = asyncio.create_task(school.client.delete(f"/jobs/{id_}")), school.rooms.jobs._tasks[id_]
    await until(lambda: task.cancelling() > 0)
    go_on.set()
    assert (await cancelling).status_code == 204
    assert (await job_of(school, id_))["state"] == "cancelled"
    assert (await school.memory())["projections"] == before["projections"]
    assert {own: {one["slot"] for one in bank} for own, bank in (await school.banks()).items()} == {
        own: {one["slot"] for one in bank} for own, bank in banks.items()
    }


async def test_one_trains_at_a_time_and_the_others_wait(held: tuple[House, Lesson]) -> None:
    house, lesson = held
    first, second = (await start(house))["id"], (await start(house))["id"]
    third = (await start(house))["id"]
    await reached(lesson)
    assert [(await job_of(house, id_))["state"] for id_ in (first, second)] == ["running", "queued"]
    assert (await house.metrics())['dmn_jobs{kind="train",state="queued"}'] == 2
    assert (await house.client.delete(f"/jobs/{third}")).status_code == 204
    lesson.go_on.set()
    assert [(await ended(house, id_))["state"] for id_ in (first, second, third)] == ["done", "done", "cancelled"]
    assert (await house.metrics())['dmn_jobs{kind="train",state="queued"}'] == 0


async def test_more_than_a_few_do_not_wait(held: tuple[House, Lesson]) -> None:
    house, lesson = held
    ids = [(await start(house))["id"] for _ in range(training.MOST_WAITING)]
    told = problem(await house.client.post("/memory/static/train"), "queue-full")
    assert told["retry_after"] > 0
    for id_ in ids:
        await house.client.delete(f"/jobs/{id_}")
    lesson.go_on.set()


async def test_requests_are_answered_while_it_trains(held: tuple[House, Lesson]) -> None:
    house, lesson = held
    id_ = (await start(house))["id"]
    await reached(lesson)
    assert len(await house.predictions(picture("red", 7))) == 1
    lesson.go_on.set()
    assert (await ended(house, id_))["state"] == "done"


async def test_shots_that_come_meanwhile_are_trained_on_too(held: tuple[House, Lesson]) -> None:
    house, lesson = held
    id_ = (await start(house))["id"]
    await reached(lesson)
    await house.upload("kind 0", picture("red", 77))
    lesson.go_on.set()
    assert (await ended(house, id_))["result"]["shots"] == 13


async def test_a_training_whose_tenant_goes_fails_and_harms_nobody(held: tuple[House, Lesson]) -> None:
    house, lesson = held
    await house.put("farm")
    id_ = (await start(house))["id"]
    await reached(lesson)
    await house.reset("static")
    lesson.go_on.set()
    job = await ended(house, id_)
    assert job["state"] == "failed"
    assert job["error"]["type"] == "/problems/invalid-request"
    assert (await house.memory())["projections"] is None


async def test_a_repeated_call_with_a_key_starts_one_training(school: House) -> None:
    calls = [
        await school.client.post("/memory/static/train", json=FAST, headers={"Idempotency-Key": "once"})
        for _ in range(2)
    ]
    assert calls[0].json() == calls[1].json()
    other = await school.client.post("/memory/static/train", json={}, headers={"Idempotency-Key": "once"})
    problem(other, "idempotency-conflict")
    await ended(school, calls[0].json()["id"])


# What is refused ------------------------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "no pass": {"epochs": 0},
    "too many passes": {"epochs": 1001},
    "a share of a pass": {"epochs": 1.5},
    "no rate": {"learning_rate": 0},
    "a negative rate": {"learning_rate": -1e-4},
    "a huge rate": {"learning_rate": 2},
    "a rate as a word": {"learning_rate": "fast"},
    "a negative seed": {"seed": -1},
    "a huge seed": {"seed": 2**60},
    "an unknown field": {"colour": "red"},
    "no object": [1],
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG)
async def test_wrong_options_are_refused(school: House, body: Any) -> None:
    problem(await school.client.post("/memory/static/train", json=body), "invalid-request")


@pytest.mark.parametrize("text", ["{", '{"learning_rate": NaN}', '{"learning_rate": 1e999}'])
async def test_bodies_that_are_no_json_are_refused(school: House, text: str) -> None:
    answer = await school.client.post(
        "/memory/static/train", content=text, headers={"Content-Type": "application/json"}
    )
    problem(answer, "invalid-request")


async def _train(house: House, tenant: str = "default") -> httpx.Response:
    return await house.client.post("/memory/static/train", headers={"X-Tenant": tenant})


async def test_without_shots_there_is_nothing_to_train_on(house: House) -> None:
    assert "two classes" in problem(await _train(house), "invalid-request")["detail"]


async def test_a_class_without_a_shot_is_named_as_the_reason(house: House) -> None:
    for colour in ("red", "green"):
        await house.upload(colour, picture(colour, 1))
    assert "1 of 3 classes have no shot" in problem(await _train(house), "invalid-request")["detail"]


async def test_shots_that_are_too_unequal_are_refused(house: House) -> None:
    await house.put(classes=["red", "green"])
    await house.upload("green", picture("green", 1))
    await house.upload("red", *(picture("red", seed) for seed in range(21)))
    assert "21 shots and another 1" in problem(await _train(house), "invalid-request")["detail"]


async def test_what_is_not_there_is_not_trained(house: House) -> None:
    problem(await _train(house, "nobody"), "unknown-tenant")
    await house.put("empty", classes=[])
    problem(await _train(house, "empty"), "no-classes")
    problem(await house.client.delete("/memory/static/train"), "not-found")
    problem(await house.client.delete("/memory/static/train", headers={"X-Tenant": "nobody"}), "unknown-tenant")


async def test_offsets_that_have_no_room_are_refused_before_they_are_trained(build: Build) -> None:
    house = await taught(await build(tenant_max_bytes=2 * 12 * SoftEncoder.dim + 10))
    problem(await _train(house), "limit-exceeded")


async def test_a_training_that_would_take_too_much_memory_is_refused(
    school: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MOST_BYTES", 10_000)
    assert "Train on fewer shots" in problem(await _train(school), "limit-exceeded")["detail"]
