"""Deadlines, full queues, guilty images, clients that leave, and the end of service."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Sequence
from types import SimpleNamespace

import httpx
import pytest
from torch import Tensor

from service import classify
from service.api import middleware
from service.telemetry.metrics import Lap
from tests.support.clock import Clock
from tests.support.fakes import picture
from tests.support.house import (
    PATIENCE_S,
    STATUS,
    Build,
    GatedEncoder,
    House,
    Json,
    RawCall,
    SoftEncoder,
    problem,
    soon,
    sound,
    until,
)

_DECODED = "dmn_stage_duration_seconds_count", {"stage": "decode"}
DECODED = 'dmn_stage_duration_seconds_count{stage="decode"}'
WHITE = picture("white", 0)


class RaisingEncoder(SoftEncoder):
    """Breaks at bright pictures, and is right about the others."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        if (pixels.float().mean((1, 2, 3)) > 190).any():
            raise RuntimeError(f"kernel panic: swordfish {pixels.shape}")
        return super().encode_images(pixels)


async def _idle(house: House) -> None:
    """Wait until nothing is in the house any more."""
    await until(lambda: not house.rooms.batcher.taken)
    await house.rooms.desk.drain()


async def _queued(house: House, images: int) -> None:
    """Wait until so many images wait for the encoder."""
    await until(lambda: len(house.rooms.batcher._waiting) == images)


# Deadlines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1e9", "1" * 400, "1,5"])
async def test_a_deadline_of_no_sense_is_refused(house: House, value: str) -> None:
    before = await house.memory()
    headers = {"X-Deadline-Ms": value}
    problem(await house.classify(picture(), headers=headers), "invalid-request")
    problem(await house.upload("red", picture(), headers=headers), "invalid-request")
    assert await house.memory() == before


@pytest.mark.parametrize("value", ["30000", "5e4", "999999999", "12345.6"])
async def test_a_deadline_far_away_changes_nothing(house: House, value: str) -> None:
    assert (await house.classify(picture(), headers={"X-Deadline-Ms": value})).status_code == 200


async def test_what_a_slow_encoder_does_not_answer_in_time_is_given_up_and_not_learned(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "_GRACE_S", PATIENCE_S)  # the images are given up one by one, however late that is
    encoder = GatedEncoder()
    house = await build(encoder)
    await house.put()
    before = await house.memory()
    encoder.shut()
    headers = {"X-Deadline-Ms": "30"}
    told = problem(
        await soon(house.classify(picture("red", 1), picture("red", 2), headers=headers)), "deadline-exceeded"
    )
    assert len(told["errors"]) == 2
    problem(await soon(house.upload("red", picture("red", 3), headers=headers)), "deadline-exceeded")
    encoder.gate.set()
    await _idle(house)
    assert await house.memory() == before
    assert await house.outcomes(picture("red", 1)) == ["filled"]


async def test_without_a_header_the_servers_own_deadline_holds(build: Build) -> None:
    encoder = GatedEncoder()
    house = await build(encoder, deadline_ms=30)
    async with asyncio.timeout(PATIENCE_S):
        while (await house.put()).status_code == STATUS["deadline-exceeded"]:
            pass  # also the body of this call has to arrive in time
    encoder.shut()
    for headers in ({}, {"X-Deadline-Ms": "60000"}):
        problem(await soon(house.classify(picture("red"), headers=headers)), "deadline-exceeded")
    encoder.gate.set()


# Full queues ----------------------------------------------------------------------------------------------------------


async def test_a_full_server_refuses_at_once_with_nothing_decoded(build: Build) -> None:
    encoder = GatedEncoder()
    house = await build(encoder, queue_images=4, batch_images=2)
    await house.put()
    encoder.shut()
    held = asyncio.create_task(house.classify(*[picture("red", seed) for seed in range(3)]))
    await encoder.reached()
    await until(lambda: house.rooms.metrics.registry.get_sample_value(*_DECODED) == 3)
    seen = await house.metrics()
    for answer in (
        await soon(house.classify(picture("blue", 1), picture("blue", 2))),
        await soon(house.classify(picture("blue", 1), views=2)),
        await soon(house.upload("blue", picture("blue", 1), picture("blue", 2))),
    ):
        told = problem(answer, "queue-full")
        assert answer.headers["retry-after"].isdigit()
        assert int(answer.headers["retry-after"]) >= 1
        assert told["retry_after"] > 0
        assert "errors" not in told
    after = await house.metrics()
    assert after[DECODED] == seen[DECODED]
    assert after['dmn_rejected_total{reason="queue-full"}'] == 3
    assert after["dmn_inflight_images"] == 3
    fits = asyncio.create_task(house.classify(picture("blue", 1)))
    encoder.gate.set()
    assert (await soon(held)).status_code == (await soon(fits)).status_code == 200
    assert len(await house.predictions(*[picture("blue", seed) for seed in range(4)])) == 4
    assert (await house.metrics())["dmn_inflight_images"] == 0
    assert [one["count"] for one in (await house.memory())["dynamic"]["classes"]] == [3, 0, 4]


async def _filled(build: Build, encoder: GatedEncoder) -> tuple[House, asyncio.Task[httpx.Response]]:
    """Return a house that holds as many images as it takes, and the call that they are of."""
    house = await build(encoder, queue_images=2, batch_images=2)
    await house.put()
    kept = await house.classify(picture("red", 1), headers=KEY)
    assert kept.status_code == 200
    encoder.shut()
    held = asyncio.create_task(house.classify(picture("green", 1), picture("green", 2)))
    await encoder.reached()
    return house, held


KEY = {"Idempotency-Key": "once"}


@pytest.mark.parametrize(
    ("path", "kind"), [("/classify", b"image/png"), ("/memory/static", b"multipart/form-data; boundary=x")]
)
async def test_a_full_server_refuses_a_call_before_its_body_has_come(build: Build, path: str, kind: bytes) -> None:
    encoder = GatedEncoder()
    house, held = await _filled(build, encoder)
    call = RawCall(app=house.app, path=path, headers=[(b"content-type", kind)])
    async with asyncio.timeout(PATIENCE_S):
        await call.run()
    assert (call.status, call.told["type"]) == (503, "/problems/queue-full")
    encoder.gate.set()
    assert (await soon(held)).status_code == 200


async def test_a_full_server_still_tells_the_answer_to_a_retry_that_it_has_kept(build: Build) -> None:
    encoder = GatedEncoder()
    house, held = await _filled(build, encoder)
    again = await soon(house.classify(picture("red", 1), headers=KEY))
    assert (again.status_code, again.json()["predictions"][0]["learned"]["outcome"]) == (200, "filled")
    problem(await soon(house.classify(picture("red", 2), headers={"Idempotency-Key": "other"})), "queue-full")
    encoder.gate.set()
    assert (await soon(held)).status_code == 200


async def test_a_call_that_would_wait_beyond_its_deadline_is_refused_at_once(build: Build) -> None:
    encoder = GatedEncoder()
    house = await build(encoder, max_wait_ms=1e9, clock=Clock())
    await house.put()
    encoder.shut()
    held = asyncio.create_task(house.classify(picture("green", 1)))
    await encoder.reached()
    house.rooms.batcher._rate, house.rooms.batcher._measured = 0.04, 1000
    for keyed in ({}, KEY):  # one that may be a retry is read first
        headers = {"X-Deadline-Ms": "24000", **keyed}
        for answer in (
            await soon(house.classify(picture("blue"), headers=headers)),
            await soon(house.upload("blue", picture("blue"), headers=headers)),
        ):
            problem(answer, "queue-full")
            assert int(answer.headers["retry-after"]) == 25
    fits = asyncio.create_task(house.classify(picture("blue", 1), headers={"X-Deadline-Ms": "26000"}))
    await _queued(house, 1)
    encoder.gate.set()
    assert (await soon(held)).status_code == (await soon(fits)).status_code == 200


# Guilty images --------------------------------------------------------------------------------------------------------


async def test_an_image_that_breaks_the_encoder_fails_alone_and_leaves_no_trace(build: Build) -> None:
    house = await build(RaisingEncoder())
    await house.put(classes=["red", "green", "blue", "white"], method="dmn")
    await house.put("other")
    good = [picture("red", 1), picture("green", 2), picture("blue", 3)]
    answer, other = await asyncio.gather(
        house.classify(good[0], WHITE, good[1], WHITE, good[2]), house.classify(*good, tenant="other")
    )
    told = answer.json()["predictions"]
    assert [one["label"] for one in told] == ["red", None, "green", None, "blue"]
    for i in (1, 3):
        sound(told[i]["error"], "internal")
        assert "swordfish" not in str(told[i])
    assert [one["label"] for one in other.json()["predictions"]] == ["red", "green", "blue"]
    before = await house.memory()
    assert [one["count"] for one in before["dynamic"]["classes"]] == [1, 1, 1, 0]
    alone = await house.classify(WHITE)
    problem(alone, "internal")
    assert "swordfish" not in alone.text
    problem(await house.upload("white", WHITE), "internal")
    shots = (await house.upload("red", WHITE, good[0])).json()["shots"]
    sound(shots[0]["error"], "internal")
    assert shots[1]["error"] is None
    after = await house.memory()
    assert after["dynamic"] == before["dynamic"]
    assert [one["count"] for one in after["static"]["classes"]] == [1, 0, 0, 0]


# Clients that leave ---------------------------------------------------------------------------------------------------


async def _leave_at_the_gate(house: House, encoder: GatedEncoder, path: str, body: bytes, kind: str) -> RawCall:
    encoder.shut()
    call = RawCall(app=house.app, path=path, body=[body], headers=[(b"content-type", kind.encode())])
    task = asyncio.create_task(call.run())
    await encoder.reached()
    call.gone.set()
    async with asyncio.timeout(PATIENCE_S):
        await task
    return call


async def test_the_image_of_a_client_that_left_is_not_learned(build: Build) -> None:
    encoder = GatedEncoder()
    house = await build(encoder)
    await house.put()
    before = await house.memory()
    await _leave_at_the_gate(house, encoder, "/classify", picture("red", 1), "image/png")
    form = (
        b'--x\r\nContent-Disposition: form-data; name="label"\r\n\r\nred\r\n'
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + picture() + b"\r\n--x--\r\n"
    )
    encoder.gate.set()
    await _leave_at_the_gate(house, encoder, "/memory/static", form, "multipart/form-data; boundary=x")
    encoder.gate.set()
    await _idle(house)
    assert await house.memory() == before
    told = await house.metrics()
    assert told['dmn_requests_total{code="499",method="POST",route="/classify"}'] == 1
    assert told['dmn_requests_total{code="499",method="POST",route="/memory/static"}'] == 1
    assert told["dmn_inflight_images"] == 0
    assert await house.outcomes(picture("red", 1)) == ["filled"]


async def test_images_of_a_client_that_left_are_not_even_encoded(build: Build) -> None:
    encoder = GatedEncoder()
    house = await build(encoder)
    await house.put()
    encoder.shut()
    held = asyncio.create_task(house.classify(picture("red", 1)))
    await encoder.reached()
    seen = encoder.images
    call = RawCall(app=house.app, path="/classify", body=[picture("red", 2)], headers=[(b"content-type", b"image/png")])
    task = asyncio.create_task(call.run())
    await _queued(house, 1)
    call.gone.set()
    async with asyncio.timeout(PATIENCE_S):
        await task
    encoder.gate.set()
    assert (await soon(held)).status_code == 200
    await _idle(house)
    assert encoder.images - seen == 1
    assert (await house.memory())["dynamic"]["classes"][0]["count"] == 1


@pytest.mark.parametrize("status", [499, 504])
async def test_an_image_that_was_given_up_while_its_memory_was_busy_is_not_learned(
    build: Build, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    house = await build()
    await house.put()
    await house.predictions(picture("red", 1))
    before = await house.memory()
    reached, gate = threading.Event(), threading.Event()
    limits: list[asyncio.Timeout] = []

    encode = house.rooms.encoder.encode_images

    def and_then_busy(pixels: Tensor) -> Tensor:
        features = encode(pixels)
        # The next step with memories, after this batch, is not the readout but a wait.
        loop.call_soon_threadsafe(lambda: waits.append(asyncio.ensure_future(house.rooms.reader.run(hold))))
        return features

    def unlimited(_: float) -> asyncio.Timeout:
        limits.append(asyncio.timeout(None))
        return limits[-1]

    def hold() -> None:
        reached.set()
        assert gate.wait(PATIENCE_S)

    loop, waits = asyncio.get_running_loop(), list[asyncio.Future[None]]()
    house.rooms.batcher._encode = and_then_busy
    monkeypatch.setattr(classify, "asyncio", SimpleNamespace(timeout=unlimited))
    call = RawCall(app=house.app, path="/classify", body=[picture("red", 2)], headers=[(b"content-type", b"image/png")])
    task = asyncio.create_task(call.run())
    assert await asyncio.to_thread(reached.wait, PATIENCE_S)
    if status == 499:
        call.gone.set()
    else:
        limits[0].reschedule(loop.time())
    async with asyncio.timeout(PATIENCE_S):
        await task
    assert call.status == status
    gate.set()
    await asyncio.gather(*waits)
    await _idle(house)
    assert await house.memory() == before


async def test_a_client_may_leave_at_any_moment(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    house = await build()
    await house.put()
    parts = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + picture("red", seed) + b"\r\n"
        for seed in range(2)
    )
    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    encode = house.rooms.batcher.encode

    async def later(moments: int) -> None:
        for _ in range(moments):
            await asyncio.sleep(0)

    async def left_meanwhile(pixels: Tensor, *, tenant: str, deadline: float, laps: list[Lap]) -> Tensor:
        features = await encode(pixels, tenant=tenant, deadline=deadline, laps=laps)
        call.gone.set()
        await later(moments)
        return features

    for meanwhile in (False, True):
        if meanwhile:
            monkeypatch.setattr(house.rooms.batcher, "encode", left_meanwhile)
        for moments in range(20):
            call = RawCall(app=house.app, path="/classify", body=[parts + b"--x--\r\n"], headers=headers)
            task = asyncio.create_task(call.run())
            if not meanwhile:
                await later(moments)
                call.gone.set()
            async with asyncio.timeout(PATIENCE_S):
                await task
            assert call.status in {200, 499}
    monkeypatch.undo()
    await _idle(house)
    gc.collect()  # what was never awaited says so now
    told = await house.metrics()
    assert (told["dmn_inflight_images"], told["dmn_queue_images"]) == (0, 0)
    assert len(await house.predictions(picture("blue", 1))) == 1


# The end of service ---------------------------------------------------------------------------------------------------


async def _probes(house: House) -> tuple[Sequence[int], Json]:
    live, ready = await house.client.get("/livez"), await house.client.get("/readyz")
    return (live.status_code, ready.status_code), dict(ready.json())


async def test_a_server_that_leaves_is_alive_and_not_ready_and_still_answers(build: Build) -> None:
    house = await build()
    await house.put()
    codes, told = await _probes(house)
    assert (codes, told["ready"]) == ((200, 200), True)
    assert all(check["ok"] and check["detail"] for check in told["checks"].values())
    house.rooms.batcher.leaving = True
    codes, told = await _probes(house)
    assert (codes, told["ready"]) == ((200, 503), False)
    assert [name for name, check in told["checks"].items() if not check["ok"]] == ["draining"]
    assert await house.outcomes(picture("red")) == ["filled"]


async def test_a_draining_server_takes_no_images_and_tells_when_to_come_back(build: Build) -> None:
    house = await build()
    await house.put()
    house.rooms.batcher.leaving = house.rooms.batcher.draining = True
    before = await house.memory()
    for answer in (await house.classify(picture()), await house.upload("red", picture())):
        problem(answer, "draining")
        assert int(answer.headers["retry-after"]) >= 1
    assert await house.memory() == before
    codes, _ = await _probes(house)
    assert codes == (200, 503)
    told = await house.metrics()
    assert told[DECODED] == 0
    assert told['dmn_rejected_total{reason="draining"}'] == 2


async def test_what_is_in_flight_is_answered_while_the_server_drains(build: Build) -> None:
    encoder = GatedEncoder()
    house = await build(encoder)
    await house.put()
    encoder.shut()
    held = asyncio.create_task(house.classify(picture("red")))
    await encoder.reached()
    house.rooms.batcher.leaving = house.rooms.batcher.draining = True
    problem(await soon(house.classify(picture("blue"))), "draining")
    encoder.gate.set()
    assert (await soon(held)).status_code == 200
