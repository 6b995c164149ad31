"""Health tells the truth: also to a service that nobody asks, whose device hangs, or whose disk fills up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service import health
from service.errors import Internal
from service.services import Rooms
from service.tenants.maintenance import canary, feel_pulse
from tests.support.clock import Clock
from tests.support.fakes import FakeEncoder
from tests.support.replicas import PATIENCE_S, Replicas, replicas


class FickleEncoder(FakeEncoder):
    """Breaks, and works again, as it is told."""

    broken = False

    def encode_images(self, pixels: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError("the device fell off the bus")
        return super().encode_images(pixels)


@pytest.fixture
def encoder() -> FickleEncoder:
    return FickleEncoder()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def rooms(encoder: FickleEncoder, clock: Clock) -> AsyncIterator[Rooms]:
    async with replicas(Replicas, clock) as house:
        yield await house.open(encoder, canary_s=60)


def _set(rooms: Rooms, settings: dict[str, object]) -> Rooms:
    return replace(rooms, settings=rooms.settings.model_copy(update=settings))


async def ready(rooms: Rooms) -> bool:
    return (await health.readiness(rooms))[0]


async def test_a_service_that_nobody_asks_tries_its_encoder_and_stays_ready(
    rooms: Rooms, encoder: FickleEncoder, clock: Clock
) -> None:
    before = encoder.images
    for _ in range(100):
        clock.advance(7)
        await feel_pulse(rooms)
        assert await ready(rooms)
    assert 0 < encoder.images - before <= 50


async def test_a_service_that_is_asked_does_not_try_its_encoder_besides(
    rooms: Rooms, encoder: FickleEncoder, clock: Clock
) -> None:
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for _ in range(10):
        clock.advance(20)
        await rooms.batcher.encode(pixels, tenant="a", deadline=clock.now + 10, laps=[])
        before = encoder.images
        await feel_pulse(rooms)
        assert encoder.images == before


async def test_an_encoder_that_breaks_ends_readiness_with_its_reason_and_one_that_works_again_brings_it_back(
    rooms: Rooms, encoder: FickleEncoder, clock: Clock
) -> None:
    encoder.broken = True
    clock.advance(59)
    await feel_pulse(rooms)
    assert await ready(rooms)
    clock.advance(2)
    await feel_pulse(rooms)
    fine, checks = await health.readiness(rooms)
    assert not fine
    assert [name for name, one in checks.items() if not one.ok] == ["encoder"]
    assert "61 s" in checks["encoder"].detail
    assert health.liveness(rooms)["worker"].ok
    encoder.broken = False
    await feel_pulse(rooms)
    assert await ready(rooms)


async def test_images_that_all_fail_are_no_sign_of_health(rooms: Rooms, encoder: FickleEncoder, clock: Clock) -> None:
    encoder.broken = True
    clock.advance(61)
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(Internal, match="encoder failed"):
        await rooms.batcher.encode(pixels, tenant="a", deadline=clock.now + 10, laps=[])
    assert not await ready(rooms)


async def test_the_canary_is_counted_nowhere_and_always_the_same(rooms: Rooms, clock: Clock) -> None:
    def counted() -> dict[str, float]:
        return {
            sample.name + str(sample.labels): sample.value
            for family in rooms.metrics.registry.collect()
            for sample in family.samples
            if not sample.name.startswith("dmn_store")
        }

    before = counted()
    clock.advance(30)
    await feel_pulse(rooms)
    assert rooms.batcher.succeeded == clock.now
    assert counted() == before
    assert torch.equal(canary(32), canary(32))
    assert canary(32).shape == (1, 3, 32, 32)
    assert canary(32).float().std() > 50


async def test_it_can_be_turned_off(rooms: Rooms, encoder: FickleEncoder, clock: Clock) -> None:
    without = _set(rooms, {"canary_s": 0.0})
    before = encoder.images
    clock.advance(10_000)
    await feel_pulse(without)
    assert encoder.images == before
    assert await ready(without)


async def test_a_device_that_hangs_is_told_after_the_time_of_the_setting(rooms: Rooms) -> None:
    hangs, gate = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        assert gate.wait(PATIENCE_S)

    work = asyncio.create_task(rooms.worker.run(hang))
    try:
        assert await asyncio.to_thread(hangs.wait, PATIENCE_S)
        assert health.liveness(rooms)["worker"].ok
        hasty = _set(rooms, {"stuck_s": 1e-9})
        assert "cpu" in health.liveness(hasty)["worker"].detail
        assert not (await health.stuck(hasty)).ok
    finally:
        gate.set()
        await work
    assert rooms.worker.busy_s == 0
    assert health.liveness(hasty)["worker"].ok


@pytest.mark.parametrize(("least", "fine"), [(0, True), (1 << 60, False)])
async def test_a_disk_with_too_little_room_ends_readiness_with_its_reason(
    rooms: Rooms, tmp_path: Path, least: int, *, fine: bool
) -> None:
    told = {"store": "embedded", "data_dir": tmp_path, "min_free_bytes": least}
    found, checks = await health.readiness(_set(rooms, told))
    assert (found, checks["disk"].ok) == (fine, fine)
    assert "MiB" in checks["disk"].detail


@pytest.mark.parametrize("fine", [True, False])
async def test_what_others_store_cannot_be_watched_by_what_is_left_of_the_disk(
    rooms: Rooms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fine: bool
) -> None:
    told = {"store": "embedded", "data_dir": tmp_path, "min_free_bytes": 1 << 30}
    details = set()
    for more in (1 << 20, 1 << 25):
        monkeypatch.setattr(health, "free_bytes", lambda _, left=more: (2 << 30) * fine + left)
        _, checks = await health.readiness(_set(rooms, told))
        assert checks["disk"].ok == fine
        details.add(checks["disk"].detail)
    assert len(details) == 1
    assert str(tmp_path) not in str(details)


async def test_a_store_elsewhere_looks_after_its_disk_itself(rooms: Rooms) -> None:
    assert "disk" not in (await health.readiness(rooms))[1]
