"""Batches of images of all tenants: none waits without need, and none pays for its neighbours."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, aclosing

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from service.concurrency.worker_thread import Worker
from service.errors import DeadlineExceeded, Draining, Internal, InvalidRequest, QueueFull, ServiceError
from service.inference.batching import Batcher
from service.inference.encoding import encode_each
from service.telemetry.metrics import Lap, Metrics

PATIENCE_S = 60.0
"""How long anything may take that is no fault; a call that hangs fails its test by it."""

GUILTY, HUGE = 13, 200
"""Values of pixels that the encoder chokes on, and that it has no room for beside others."""


def image(value: int, views: int = 1) -> Tensor:
    return torch.full((views, 3, 2, 2), value, dtype=torch.uint8)


def features(values: Tensor) -> Tensor:
    """Return a unit vector for each value, at its own angle."""
    angles = values.float() / 100
    return torch.stack((angles.cos(), angles.sin()), 1)


def encode(pixels: Tensor) -> Tensor:
    return features(pixels[:, 0, 0, 0])


def same(result: object, value: int, views: int = 1) -> bool:
    """Return whether a result is the features of `views` views of one value."""
    return isinstance(result, Tensor) and torch.allclose(result, features(torch.tensor([value] * views)))


class Device:
    """An encoder whose features are the first pixel, which works when its gate is open and notes its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches.append(pixels[:, 0, 0, 0].tolist())
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        return encode(pixels)

    def shut(self) -> None:
        self.gate.clear()
        self.entered.clear()

    async def at_work(self) -> None:
        """Wait until a batch has come."""
        assert await asyncio.to_thread(self.entered.wait, PATIENCE_S)


class Shuttle:
    """A batcher over a device, with a clock that stands still until it is told."""

    def __init__(
        self,
        *,
        batch: int = 4,
        queue: int = 64,
        tenant_images: int = 64,
        wait_s: float = 0.0,
        max_wait_s: float = 0.0,
        batch_s: float = math.inf,
    ) -> None:
        self.now = 0.0
        self.device, self.worker = Device(), Worker()
        self.encode: Callable[[Tensor], Tensor] = self.device
        self.metrics = Metrics(CollectorRegistry())
        self.batcher = Batcher(
            self.worker,
            self._encode,
            self.metrics,
            lambda: self.now,
            batch_images=batch,
            queue_images=queue,
            tenant_images=tenant_images,
            wait_s=wait_s,
            max_wait_s=max_wait_s,
            batch_s=batch_s,
        )

    def send(self, value: int, views: int = 1, deadline: float = 1e9, tenant: str = "a") -> asyncio.Task[Tensor]:
        return asyncio.create_task(self.batcher.encode(image(value, views), tenant=tenant, deadline=deadline, laps=[]))

    async def send_in_order(self, *values: int) -> list[asyncio.Task[Tensor]]:
        """Send images, and return when all of them stand in the queue."""
        tasks = [self.send(value) for value in values]
        await settle()
        return tasks

    async def work_at(self, rate: float) -> None:
        """Encode a few batches, so many images times views a second: so often that the rate is known."""

        def slow(pixels: Tensor) -> Tensor:
            self.now += len(pixels) / rate
            return encode(pixels)

        self.encode = slow
        for _ in range(5):
            await answers(self.send(1, views=8))

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.encode(pixels)

    def sample(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name)

    async def aclose(self) -> None:
        self.device.gate.set()
        await self.batcher.aclose()
        self.worker.close()


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def answers(*tasks: asyncio.Task[Tensor]) -> list[Tensor | BaseException]:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def shuttle() -> AsyncIterator[Shuttle]:
    shuttle = Shuttle()
    shuttle.batcher.start()
    yield shuttle
    await shuttle.aclose()


async def hold(shuttle: Shuttle, value: int = 99) -> asyncio.Task[Tensor]:
    """Keep the device busy with one image until its gate is opened."""
    shuttle.device.shut()
    task = shuttle.send(value)
    await shuttle.device.at_work()
    return task


# When a batch goes ----------------------------------------------------------------------------------------------------


async def test_each_image_gets_its_own_features(shuttle: Shuttle) -> None:
    first, second = await answers(shuttle.send(1), shuttle.send(2, views=3))
    assert same(first, 1)
    assert same(second, 2, views=3)


async def test_a_lone_image_goes_at_once(shuttle: Shuttle) -> None:
    await answers(shuttle.send(1))
    await answers(shuttle.send(2))
    assert shuttle.device.batches == [[1], [2]]


async def test_what_comes_while_the_device_is_busy_goes_together(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    rest = await shuttle.send_in_order(1, 2, 3)
    shuttle.device.gate.set()
    await answers(first, *rest)
    assert shuttle.device.batches == [[99], [1, 2, 3]]


async def test_a_batch_holds_no_more_than_it_may_and_keeps_the_order(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    rest = await shuttle.send_in_order(*range(10))
    shuttle.device.gate.set()
    await answers(first, *rest)
    assert shuttle.device.batches[1:] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def largest_batch(shuttle: Shuttle, rate: float) -> int:
    """Return how many images of forty go together first, on a device that encodes so many a second."""

    def slow(pixels: Tensor) -> Tensor:
        shuttle.now += len(pixels) / rate
        return shuttle.device(pixels)

    shuttle.encode = slow
    await answers(shuttle.send(1, views=8))
    first = await hold(shuttle)
    rest = await shuttle.send_in_order(*range(40))
    shuttle.device.gate.set()
    await answers(first, *rest)
    return len(shuttle.device.batches[2])


@pytest.mark.parametrize(("rate", "largest"), [(2.0, 8), (20.0, 20), (1000.0, 32)])
async def test_a_batch_holds_what_the_device_encodes_in_the_seconds_that_one_may_take(
    rate: float, largest: int
) -> None:
    async with aclosing(Shuttle(batch=32, batch_s=1.0)) as shuttle:
        shuttle.batcher.start()
        assert await largest_batch(shuttle, rate) == largest


@pytest.mark.parametrize(("seconds_ago", "largest"), [(9.0, 8), (11.0, 32)])
async def test_batches_are_small_while_tenants_share_the_device(seconds_ago: float, largest: int) -> None:
    async with aclosing(Shuttle(batch=32, batch_s=1.0)) as shuttle:
        shuttle.batcher.start()
        with shuttle.batcher.admit(1, tenant="a"), shuttle.batcher.admit(1, tenant="b"):
            pass
        shuttle.now += seconds_ago
        assert await largest_batch(shuttle, 1000.0) == largest


async def test_batches_are_as_large_as_the_settings_say_whoever_shares_the_device() -> None:
    async with aclosing(Shuttle(batch=32)) as shuttle:
        shuttle.batcher.start()
        with shuttle.batcher.admit(1, tenant="a"), shuttle.batcher.admit(1, tenant="b"):
            assert await largest_batch(shuttle, 1000.0) == 32


async def test_views_count_as_images_and_are_not_torn_apart(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    rest = [shuttle.send(1, views=3), shuttle.send(2, views=2), shuttle.send(3)]
    await settle()
    shuttle.device.gate.set()
    await answers(first, *rest)
    assert shuttle.device.batches[1:] == [[1, 1, 1], [2, 2, 3]]


async def test_an_image_of_more_views_than_a_batch_still_goes(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    rest = [shuttle.send(1), shuttle.send(2, views=9), shuttle.send(3)]
    await settle()
    shuttle.device.gate.set()
    results = await answers(first, *rest)
    assert shuttle.device.batches[1:] == [[1], [2] * 9, [3]]
    assert same(results[2], 2, views=9)


async def test_a_configured_wait_counts_from_the_first_image() -> None:
    shuttle = Shuttle(wait_s=1000.0)
    shuttle.batcher.start()
    first = asyncio.create_task(shuttle.batcher.encode(image(99, views=4), tenant="a", deadline=1e9, laps=[]))
    shuttle.device.shut()
    await shuttle.device.at_work()
    early = await shuttle.send_in_order(1)
    shuttle.now = 999.0
    late = await shuttle.send_in_order(2)
    shuttle.now = 1000.0
    shuttle.device.gate.set()
    await answers(first, *early, *late)
    assert shuttle.device.batches[1:] == [[1, 2]]
    await shuttle.aclose()


async def test_a_full_batch_does_not_wait() -> None:
    shuttle = Shuttle(wait_s=1000.0)
    shuttle.batcher.start()
    tasks = await shuttle.send_in_order(1, 2, 3)
    assert shuttle.device.batches == []
    tasks.append(shuttle.send(4))
    await answers(*tasks)
    assert shuttle.device.batches == [[1, 2, 3, 4]]
    await shuttle.aclose()


# Who is left out ------------------------------------------------------------------------------------------------------


async def test_an_image_that_nobody_waits_for_is_not_encoded(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    gone, stays = await shuttle.send_in_order(1, 2)
    gone.cancel()
    await settle()
    shuttle.device.gate.set()
    await answers(first, gone, stays)
    assert shuttle.device.batches[1:] == [[2]]


async def test_a_queue_that_everybody_left_encodes_nothing_and_goes_on(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    gone = await shuttle.send_in_order(1, 2)
    for task in gone:
        task.cancel()
    await settle()
    shuttle.device.gate.set()
    await answers(first, *gone)
    await answers(shuttle.send(3))
    assert shuttle.device.batches[1:] == [[3]]


async def test_an_image_that_is_late_is_told_so_and_not_encoded(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    late, timely = shuttle.send(1, deadline=5.0), shuttle.send(2, deadline=6.0)
    await settle()
    shuttle.now = 5.5
    shuttle.device.gate.set()
    _, told, answered = await answers(first, late, timely)
    assert isinstance(told, DeadlineExceeded)
    assert isinstance(answered, Tensor)
    assert shuttle.device.batches[1:] == [[2]]


async def test_a_caller_that_leaves_in_the_middle_of_its_batch_stops_nobody(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    batch = await shuttle.send_in_order(1, 2)
    shuttle.device.entered.clear()
    shuttle.device.gate.set()
    await answers(first)
    batch[0].cancel()
    results = await answers(*batch)
    assert isinstance(results[1], Tensor)
    assert isinstance((await answers(shuttle.send(3)))[0], Tensor)


# What goes wrong on the device ----------------------------------------------------------------------------------------


def picky(pixels: Tensor) -> Tensor:
    """Encode, but fail on every batch with a guilty image in it."""
    values = pixels[:, 0, 0, 0]
    if (values == GUILTY).any():
        raise ValueError("guilty")
    return encode(pixels)


class Small:
    """A device that has no room for more than a few images, and notes what it was asked for."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sizes: list[int] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.sizes.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return encode(pixels)


@pytest.mark.parametrize("guilty", [{0}, {3}, {6}, {2, 3}, {0, 6}, set(range(7))])
def test_of_a_batch_that_fails_the_guilty_images_alone_fail(guilty: set[int]) -> None:
    values = [GUILTY if n in guilty else n + 1 for n in range(7)]
    results = encode_each(picky, [image(value) for value in values])
    assert {n for n, result in enumerate(results) if isinstance(result, Internal)} == guilty
    for value, result in zip(values, results, strict=True):
        assert isinstance(result, Internal) or same(result, value)


def test_an_image_that_fails_says_nothing_of_what_went_on_inside() -> None:
    (result,) = encode_each(picky, [image(GUILTY)])
    assert isinstance(result, Internal)
    assert "guilty" not in result.detail


@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_a_batch_that_has_no_room_is_halved_until_it_fits(room: int) -> None:
    device = Small(room)
    results = encode_each(device, [image(n) for n in range(8)])
    assert all(same(result, n) for n, result in enumerate(results))
    assert max(size for size in device.sizes if size <= room) <= room


@pytest.mark.parametrize("views", [2, 5, 8])
def test_an_image_whose_views_have_no_room_is_encoded_in_parts(views: int) -> None:
    pixels = torch.arange(views, dtype=torch.uint8)[:, None, None, None].expand(views, 3, 2, 2)
    (result,) = encode_each(Small(1), [pixels])
    assert isinstance(result, Tensor)
    assert torch.allclose(result, features(torch.arange(views)))


def test_an_image_that_has_no_room_even_alone_fails_alone() -> None:
    def cramped(pixels: Tensor) -> Tensor:
        if (pixels == HUGE).any():
            raise torch.OutOfMemoryError("out of memory")
        return encode(pixels)

    results = encode_each(cramped, [image(1), image(HUGE, views=3), image(2)])
    assert [isinstance(result, ServiceError) for result in results] == [False, True, False]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0])
def test_an_image_whose_feature_is_no_direction_fails_alone(wrong: float) -> None:
    """A feature that is not finite, or zero, would poison the memory that it enters."""

    def broken(pixels: Tensor) -> Tensor:
        out = encode(pixels)
        out[pixels[:, 0, 0, 0] == GUILTY] = wrong
        return out

    results = encode_each(broken, [image(1), image(GUILTY), image(2)])
    assert [isinstance(result, ServiceError) for result in results] == [False, True, False]


async def test_a_guilty_image_fails_and_the_next_batch_goes_on(shuttle: Shuttle) -> None:
    shuttle.encode = picky
    results = await answers(shuttle.send(1), shuttle.send(GUILTY), shuttle.send(2))
    assert [type(result) for result in results] == [Tensor, Internal, Tensor]
    assert isinstance((await answers(shuttle.send(3)))[0], Tensor)


async def test_the_loop_outlives_a_fault_of_its_own_bookkeeping(
    shuttle: Shuttle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shuttle.metrics.batch_images, "observe", _broken)
        (told,) = await answers(shuttle.send(1))
    assert isinstance(told, Internal)
    assert isinstance((await answers(shuttle.send(2)))[0], Tensor)


def _broken(*_: object) -> None:
    raise RuntimeError("broken")


async def test_the_loop_outlives_an_encoder_that_returns_the_wrong_number_of_features(shuttle: Shuttle) -> None:
    shuttle.encode = lambda pixels: torch.zeros(len(pixels) + 1, 2)
    (told,) = await answers(shuttle.send(1))
    assert isinstance(told, Internal)
    shuttle.encode = shuttle.device
    assert isinstance((await answers(shuttle.send(2)))[0], Tensor)


# Fairness -------------------------------------------------------------------------------------------------------------


async def test_a_flood_of_one_tenant_delays_an_image_of_another_by_one_batch_at_most(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    flood = [shuttle.send(value, tenant="flood") for value in range(1, 21)]
    await settle()
    other = shuttle.send(50, tenant="other")
    await settle()
    shuttle.device.gate.set()
    await answers(first, *flood, other)
    assert 50 in shuttle.device.batches[1]
    assert [value for batch in shuttle.device.batches[1:] for value in batch if value != 50] == list(range(1, 21))


async def test_tenants_share_a_batch_evenly_and_each_keeps_its_own_order(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    tasks = [shuttle.send(10 * tenant + value, tenant=str(tenant)) for tenant in (1, 2) for value in range(4)]
    await settle()
    shuttle.device.gate.set()
    await answers(first, *tasks)
    assert shuttle.device.batches[1:] == [[10, 20, 11, 21], [12, 22, 13, 23]]


# Admission ------------------------------------------------------------------------------------------------------------


def test_room_is_held_until_the_images_are_answered_however_they_end() -> None:
    shuttle = Shuttle(queue=4)
    with shuttle.batcher.admit(3, tenant="a"), shuttle.batcher.admit(1, tenant="a"):
        assert shuttle.batcher.taken == 4
        assert shuttle.sample("dmn_inflight_images") == 4
    with pytest.raises(KeyError), shuttle.batcher.admit(4, tenant="a"):
        raise KeyError
    assert shuttle.batcher.taken == 0
    assert shuttle.sample("dmn_inflight_images") == 0
    shuttle.worker.close()


@pytest.mark.parametrize("images", [1, 3])
def test_a_full_server_refuses_one_image_or_many_and_says_when_to_come_back(images: int) -> None:
    shuttle = Shuttle(queue=4)
    with ExitStack() as held:
        held.enter_context(shuttle.batcher.admit(4, tenant="a"))
        with pytest.raises(QueueFull) as refused, shuttle.batcher.admit(images, tenant="a"):
            pass
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s >= 1
        assert shuttle.batcher.taken == 4
    with shuttle.batcher.admit(4, tenant="a"):
        pass
    shuttle.worker.close()


def test_a_call_that_can_never_fit_is_not_told_to_come_back() -> None:
    shuttle = Shuttle(queue=4)
    with pytest.raises(InvalidRequest), shuttle.batcher.admit(5, tenant="a"):
        pass
    assert shuttle.batcher.taken == 0
    shuttle.worker.close()


def test_a_tenant_that_floods_leaves_room_for_any_other_that_comes() -> None:
    shuttle = Shuttle(queue=12, tenant_images=8)
    with ExitStack() as held:
        for tenant, share in (("a", 8), ("b", 4)):
            for _ in range(share):
                held.enter_context(shuttle.batcher.admit(1, tenant=tenant))
            with pytest.raises(QueueFull), shuttle.batcher.admit(1, tenant=tenant):
                pass
        with pytest.raises(QueueFull), shuttle.batcher.admit(1, tenant="c"):
            pass
    with ExitStack() as held:
        for tenant, share in (("a", 4), ("b", 4), ("c", 3)):
            held.enter_context(shuttle.batcher.admit(share, tenant=tenant))
        for tenant in "ab":
            with pytest.raises(QueueFull), shuttle.batcher.admit(1, tenant=tenant):
                pass
        held.enter_context(shuttle.batcher.admit(1, tenant="d"))
    assert shuttle.batcher.taken == 0
    shuttle.worker.close()


@pytest.mark.parametrize(("leaving", "draining"), [(True, False), (True, True)])
def test_a_server_that_is_about_to_leave_still_takes_images_until_it_drains(*, leaving: bool, draining: bool) -> None:
    shuttle = Shuttle()
    shuttle.batcher.leaving, shuttle.batcher.draining = leaving, draining
    if draining:
        with pytest.raises(Draining), shuttle.batcher.admit(1, tenant="a"):
            pass
    else:
        with shuttle.batcher.admit(1, tenant="a"):
            assert shuttle.batcher.taken == 1
    shuttle.worker.close()


async def test_the_time_to_come_back_is_what_is_in_the_server_over_the_measured_rate() -> None:
    shuttle = Shuttle(batch=8, queue=1000, tenant_images=1000)
    shuttle.batcher.start()

    def slow(pixels: Tensor) -> Tensor:
        shuttle.now += 4.0
        return encode(pixels)

    shuttle.encode = slow
    assert shuttle.batcher.retry_after_s() == 1.0
    await answers(shuttle.send(1, views=8))
    for taken, seconds in ((2, 1.0), (20, 10.0), (21, 11.0), (500, 60.0)):
        with shuttle.batcher.admit(taken, tenant="a"):
            assert shuttle.batcher.retry_after_s() == seconds
    await answers(shuttle.send(1, views=4))
    with shuttle.batcher.admit(36, tenant="a"):
        assert shuttle.batcher.retry_after_s() == 20.0, "0.8 of two a second, and 0.2 of one a second"
    await shuttle.aclose()


# Admission by expected wait -------------------------------------------------------------------------------------------


async def patient(*, rate: float = 2.0, max_wait_s: float = 10.0, batch: int = 8, tenant_images: int = 500) -> Shuttle:
    """Return a batcher that knows its rate, with room for a thousand images."""
    shuttle = Shuttle(batch=batch, queue=1000, tenant_images=tenant_images, max_wait_s=max_wait_s)
    shuttle.batcher.start()
    await shuttle.work_at(rate)
    return shuttle


def let_in(shuttle: Shuttle, images: int = 1, *, tenant: str = "a", deadline: float = math.inf) -> bool:
    """Return whether images are taken in."""
    try:
        with shuttle.batcher.admit(images, tenant=tenant, deadline=deadline):
            return True
    except QueueFull:
        return False


async def test_a_call_is_refused_while_what_goes_before_it_takes_longer_than_anybody_is_to_wait() -> None:
    shuttle = await patient()
    with shuttle.batcher.admit(19, tenant="a"):
        assert let_in(shuttle, 100)
        with shuttle.batcher.admit(2, tenant="a"):
            with pytest.raises(QueueFull) as refused, shuttle.batcher.admit(1, tenant="a"):
                pass
            assert refused.value.retry_after_s == 11.0
        assert let_in(shuttle)
    await shuttle.aclose()


async def test_an_empty_server_takes_any_call_however_slow_it_is() -> None:
    shuttle = await patient(rate=0.001, max_wait_s=0.001)
    assert let_in(shuttle, 500)
    assert let_in(shuttle, deadline=shuttle.now + 0.001)
    with shuttle.batcher.admit(1, tenant="a"):
        assert not let_in(shuttle)
    await shuttle.aclose()


@pytest.mark.parametrize(("batches", "taken"), [(4, True), (5, False)])
async def test_before_a_rate_is_known_only_the_length_of_the_queue_counts(batches: int, *, taken: bool) -> None:
    shuttle = Shuttle(max_wait_s=1.0)
    shuttle.batcher.start()
    for _ in range(batches):
        first = await hold(shuttle)
        shuttle.now += 100.0
        shuttle.device.gate.set()
        await answers(first)
    with shuttle.batcher.admit(10, tenant="a"):
        assert let_in(shuttle) is taken
    await shuttle.aclose()


async def test_with_no_limit_of_the_wait_only_the_length_of_the_queue_counts() -> None:
    shuttle = await patient(rate=0.001, max_wait_s=0.0)
    with shuttle.batcher.admit(400, tenant="a"):
        assert let_in(shuttle)
        assert let_in(shuttle, deadline=shuttle.now + 1.0)
    await shuttle.aclose()


@pytest.mark.parametrize(("left_s", "taken"), [(3.9, False), (4.1, True), (0.0, True), (-1.0, True)])
async def test_a_call_that_would_be_late_anyway_is_refused_at_once(left_s: float, *, taken: bool) -> None:
    """One whose time is up already is not: it is told what that is, a deadline that has passed."""
    shuttle = await patient()
    with shuttle.batcher.admit(8, tenant="a"):
        assert let_in(shuttle, deadline=shuttle.now + left_s) is taken
    await shuttle.aclose()


async def test_a_flood_of_one_tenant_costs_no_other_its_room() -> None:
    """A tenant waits for the batch under way, and for one image of each other for each of its own."""
    shuttle = await patient()
    with ExitStack() as held:
        held.enter_context(shuttle.batcher.admit(100, tenant="flood"))
        assert not let_in(shuttle, tenant="flood")
        for own in range(6):
            assert 8 + own + (own + 1) <= 20
            held.enter_context(shuttle.batcher.admit(1, tenant="b"))
        assert not let_in(shuttle, tenant="b")
        assert let_in(shuttle, tenant="c")
    await shuttle.aclose()


async def test_the_rate_counts_what_holds_images_up_between_batches() -> None:
    """As slow decoding does, or readouts; but not that nobody was there."""
    shuttle = await patient(rate=1000.0, max_wait_s=0.0)
    with shuttle.batcher.admit(40, tenant="a"):
        for _ in range(60):
            shuttle.now += 4.0
            await answers(shuttle.send(1, views=8))
        assert shuttle.batcher.retry_after_s() == pytest.approx(20, abs=1), "8 images in four seconds"
    shuttle.now += 1000.0
    with shuttle.batcher.admit(40, tenant="a"):
        await answers(shuttle.send(1, views=8))
        assert shuttle.batcher.retry_after_s() == 1.0, "a fifth of a thousand a second"
    await shuttle.aclose()


async def test_who_knocks_is_told_what_one_image_would_be() -> None:
    shuttle = await patient()
    shuttle.batcher.knock(tenant="a", deadline=math.inf)
    with shuttle.batcher.admit(21, tenant="a"):
        with pytest.raises(QueueFull):
            shuttle.batcher.knock(tenant="a", deadline=math.inf)
        shuttle.batcher.knock(tenant="b", deadline=math.inf)
        with pytest.raises(QueueFull):
            shuttle.batcher.knock(tenant="b", deadline=shuttle.now + 1.0)
        shuttle.batcher.leaving = True
        shuttle.batcher.knock(tenant="a", deadline=math.inf)
    assert shuttle.batcher.taken == 0
    await shuttle.aclose()


# What is counted ------------------------------------------------------------------------------------------------------


async def test_the_queue_counts_images_that_wait_and_none_that_are_at_work(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    rest = await shuttle.send_in_order(1, 2)
    assert shuttle.sample("dmn_queue_images") == 2
    shuttle.device.gate.set()
    await answers(first, *rest)
    assert shuttle.sample("dmn_queue_images") == 0
    assert shuttle.sample("dmn_batch_images_sum") == 3
    assert shuttle.sample("dmn_batch_images_count") == 2


async def test_each_image_hears_how_long_it_waited_and_worked(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    shuttle.now = 2.0
    laps: list[Lap] = []
    second = asyncio.create_task(shuttle.batcher.encode(image(1), tenant="a", deadline=1e9, laps=laps))
    await settle()
    shuttle.now = 5.0
    shuttle.device.gate.set()
    await answers(first, second)
    assert [lap[:2] for lap in laps] == [("queue", 3.0), ("encode", 0.0)]


# Closing --------------------------------------------------------------------------------------------------------------


async def test_closing_tells_the_waiting_ones(shuttle: Shuttle) -> None:
    first = await hold(shuttle)
    waiting = await shuttle.send_in_order(1, 2)
    closing = asyncio.create_task(shuttle.batcher.aclose())
    await settle()
    shuttle.device.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        await closing
    assert [type(told) for told in await answers(*waiting)] == [Draining, Draining]
    assert first.cancel() or first.done()


async def test_closing_leaves_no_image_at_work_without_an_answer(shuttle: Shuttle) -> None:
    at_work = await hold(shuttle)
    closing = asyncio.create_task(shuttle.batcher.aclose())
    await settle()
    shuttle.device.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        await closing
    await answers(at_work)


async def test_an_image_that_comes_after_the_close_is_told_so(shuttle: Shuttle) -> None:
    await shuttle.batcher.aclose()
    (reply,) = await answers(shuttle.send(1))
    assert isinstance(reply, Draining)


async def test_closing_twice_or_without_a_start_is_no_fault() -> None:
    shuttle = Shuttle()
    await shuttle.aclose()
    await shuttle.batcher.aclose()
    assert shuttle.batcher.draining


def test_features_follow_their_images_through_any_number_of_views() -> None:
    counts: Sequence[int] = (1, 4, 2, 1)
    results = encode_each(Device(), [image(n, views) for n, views in enumerate(counts)])
    assert [len(result) for result in results] == list(counts)  # type: ignore[arg-type]


async def test_it_is_quiet_when_no_image_waits_for_the_device_also_while_it_works(shuttle: Shuttle) -> None:
    batcher = shuttle.batcher
    assert batcher.is_quiet
    first = await hold(shuttle)
    assert batcher.is_quiet
    second = shuttle.send(1)
    await settle()
    assert not batcher.is_quiet
    waiting = asyncio.create_task(batcher.quiet())
    await settle()
    assert not waiting.done()
    shuttle.device.gate.set()
    await answers(first, second)
    async with asyncio.timeout(PATIENCE_S):
        await waiting
    assert batcher.is_quiet
