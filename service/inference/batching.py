"""The shuttle: images of all tenants into encode batches, one result or one error an image.

The queue is bounded in images times views, and by how long a call would wait in it, and both are checked before
anything is decoded; whoever is there, a share of it stays free for the next tenant that comes. A batch goes as soon as
the device is free; while it is busy the next one gathers, one image of each tenant in turn.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.concurrency.fair_queue import Turns
from service.concurrency.worker_thread import Worker
from service.errors import DeadlineExceeded, Draining, Internal, InvalidRequest, QueueFull, ServiceError
from service.settings import Settings
from service.telemetry import logs
from service.telemetry.metrics import Lap, Metrics

from .encoding import encode_each

_RATE_MEMORY = 0.8
_RATE_BATCHES = 5
"""Batches that tell a rate: the first ones find a cold device, and processors that decode what came with them."""

_LEAST = 8
"""Images times views that a batch may have, however slow the device is."""

_SHARED_S = 10.0
"""For so long after two tenants were here at a time, neither is to wait for long batches of the other."""

_LONGEST_RETRY_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Item:
    """One image's views on their way to the device."""

    pixels: Tensor
    deadline: float
    queued: float
    laps: list[Lap]
    future: asyncio.Future[Tensor] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Collects pixels until the device is free, encodes them together, and hands each caller its own.

    A batch has `batch_images` images times views at most. Where `batch_s` is finite it also has no more than the device
    encodes in so many seconds, and while tenants share the device few, however fast it is.
    """

    def __init__(
        self,
        worker: Worker,
        encode: Callable[[Tensor], Tensor],
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        batch_images: int,
        queue_images: int,
        tenant_images: int,
        wait_s: float,
        max_wait_s: float,
        batch_s: float = math.inf,
    ) -> None:
        self._worker, self._encode, self.metrics, self._clock = worker, encode, metrics, clock
        self.batch_images, self._batch_s = batch_images, batch_s
        self._queue_images, self._wait_s = queue_images, wait_s
        self._tenant_images, self._max_wait_s = tenant_images, max_wait_s
        self._waiting: Turns[_Item] = Turns()
        self._waiting_images = 0
        self._arrived = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._taken: Counter[str] = Counter()
        self._all_taken = 0
        self._rate, self._measured = 0.0, 0
        self._shared = -math.inf
        self._busy_since: float | None = None
        self._loop: asyncio.Task[None] | None = None
        self._closed = False
        self.succeeded = clock()
        """When an image was encoded last: whether the device works."""
        self.leaving = False
        """Whether readiness is off: the balancer should stop sending, and what still comes is answered."""
        self.draining = False
        """Whether new work is refused."""

    def start(self) -> None:
        """Start to take batches."""
        self._loop = asyncio.create_task(self._run(), name="dmn-batcher")

    async def aclose(self) -> None:
        """Stop; images that still wait, and those that come, are told that the server is going down."""
        self.draining = self._closed = True
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        _fail(self._waiting.clear(), _stopping())
        self._count_waiting(-self._waiting_images)

    @property
    def taken(self) -> int:
        """Images times views that are in the server."""
        return self._all_taken

    @contextmanager
    def admit(self, images: int, *, tenant: str, deadline: float = math.inf) -> Iterator[None]:
        """Hold room for images times views of a tenant until they are answered, by a moment of the clock if need be.

        Raises:
            Draining: the server is going down.
            QueueFull: there is no room now, at all or for this tenant, or too much goes before; says when to come back.
            InvalidRequest: there is never room for so many.
        """
        if self.draining:
            raise _stopping()
        most = min(self._tenant_images, self._queue_images)
        if images > most:
            raise InvalidRequest(
                f"The call holds {images} images times views; the server takes in {most} of a tenant at most."
            )
        self._check_room(images, tenant, deadline)
        self._take(tenant, images)
        try:
            yield
        finally:
            self._take(tenant, -images)

    def knock(self, *, tenant: str, deadline: float) -> None:
        """Return if a tenant's call may be read: one that brings but one image would be let in.

        So that what is refused costs nothing to read. Whoever may come is still counted by `admit`.

        Raises:
            QueueFull: it would not; says when to come again.
        """
        if not self.leaving:  # who hangs up on a body that it has not read takes back what it has just said
            self._check_room(1, tenant, deadline)

    def retry_after_s(self) -> float:
        """Return the seconds until what is in the server will be done, by the measured rate; at least 1."""
        seconds = self.taken / self._rate if self._rate else 1.0
        return float(min(_LONGEST_RETRY_S, max(1.0, math.ceil(seconds))))

    async def encode(self, pixels: Tensor, *, tenant: str, deadline: float, laps: list[Lap]) -> Tensor:
        """Return the features (v, d) of an image's views (v, 3, h, w).

        Raises:
            DeadlineExceeded: the device was not free before the deadline.
            Internal: this very image cannot be encoded.
        """
        if self._closed:
            raise _stopping()
        item = _Item(pixels=pixels, deadline=deadline, queued=self._clock(), laps=laps)
        self._waiting.put(tenant, item)
        self._count_waiting(len(pixels))
        self._arrived.set()
        return await item.future

    @property
    def is_quiet(self) -> bool:
        """Whether no image waits for the device."""
        return self._quiet.is_set()

    async def quiet(self) -> None:
        """Return when no image waits for the device: what nobody waits for may have it."""
        await self._quiet.wait()

    async def probe(self, pixels: Tensor) -> None:
        """Encode an image that nobody sent, pixels (1, 3, h, w), to know whether the device works; nobody counts it."""
        self._note(await self._worker.run(encode_each, self._encode, [pixels]))

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            if self._wait_s:
                await self._fill()
            batch = self._next_batch()
            if batch:
                try:
                    await self._deliver(batch)
                except asyncio.CancelledError:
                    _fail(batch, _stopping())
                    raise
                except Exception as error:  # noqa: BLE001 - the loop must outlive any batch
                    logs.event(logs.BATCH_FAILED, level=logging.ERROR, error=error)
                    _fail(batch, Internal("The batch of this image failed."))

    async def _fill(self) -> None:
        """Wait for a full batch, no longer than the setting says, counted from the first image."""
        ends = min((item.queued for item in self._waiting), default=0.0) + self._wait_s
        while self._waiting_images < self._room:
            self._arrived.clear()
            left = ends - self._clock()
            if left <= 0:
                return
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    def _next_batch(self) -> list[_Item]:
        """Take images up to a full batch, passing over those that nobody waits for or that are late."""
        batch: list[_Item] = []
        room, now = self._room, self._clock()
        while self._waiting and (len(self._waiting.first().pixels) <= room or not batch):
            item = self._waiting.take()
            self._count_waiting(-len(item.pixels))
            if item.future.done():
                continue
            if now > item.deadline:
                item.future.set_exception(DeadlineExceeded("The image was still waiting when its deadline passed."))
                continue
            batch.append(item)
            room -= len(item.pixels)
        if not self._waiting:
            self._arrived.clear()
        return batch

    async def _deliver(self, batch: list[_Item]) -> None:
        start = self._clock()
        for item in batch:
            self.metrics.observe_stage("queue", start - item.queued, item.laps)
        size = sum(len(item.pixels) for item in batch)
        self.metrics.batch_images.observe(size)
        results = await self._worker.run(encode_each, self._encode, [item.pixels for item in batch])
        self._note(results)
        seconds = self._clock() - start
        self._learn_rate(size, start)
        for item, result in zip(batch, results, strict=True):
            self.metrics.observe_stage("encode", seconds, item.laps)
            if item.future.done():
                continue
            if isinstance(result, ServiceError):
                item.future.set_exception(result)
            else:
                item.future.set_result(result)

    def _note(self, results: Sequence[Tensor | ServiceError]) -> None:
        if any(isinstance(one, Tensor) for one in results):
            self.succeeded = self._clock()

    def _learn_rate(self, size: int, start: float) -> None:
        """Note how fast images get through: a batch's since the one before if somebody was here all the time.

        Then the time between two batches tells whatever held them up, decoding and readouts too; otherwise only the
        batch's own does.
        """
        now = self._clock()
        rate = size / max(now - (start if self._busy_since is None else self._busy_since), 1e-6)
        self._rate = _RATE_MEMORY * self._rate + (1 - _RATE_MEMORY) * rate if self._rate else rate
        self._measured += 1
        self._busy_since = now if self.taken else None

    def _check_room(self, images: int, tenant: str, deadline: float) -> None:
        """Return if there is room for images times views of a tenant, and what goes before them is done in time.

        A call that would be late anyway is told so now, while another server may still be asked.

        Raises:
            QueueFull: it is not so.
        """
        if self._taken[tenant] + images > self._share(tenant) or self.taken + images > self._queue_images:
            raise QueueFull(
                f"There is no room for {images} more images times views of this tenant, which has "
                f"{self._taken[tenant]} here; some is left for tenants that have none.",
                retry_after_s=self.retry_after_s(),
            )
        if not self._max_wait_s or self._measured < _RATE_BATCHES:
            return
        wait_s, left_s = self._ahead(tenant) / self._rate, deadline - self._clock()
        if wait_s > self._max_wait_s or 0 < left_s < wait_s:
            raise QueueFull(
                "What goes before this call takes longer than its deadline allows, or than anybody is to wait here.",
                retry_after_s=self.retry_after_s(),
            )

    @property
    def _room(self) -> int:
        """How many images times views the next batch may have."""
        if math.isinf(self._batch_s):
            return self.batch_images
        if self._clock() - self._shared < _SHARED_S:
            return min(self.batch_images, _LEAST)
        return min(self.batch_images, max(_LEAST, int(self._rate * self._batch_s)))

    def _ahead(self, tenant: str) -> int:
        """Return about how many images times views go before the next of a tenant: none where nobody is here.

        A batch that is under way, the tenant's own, and as many of each other tenant, since they take turns, and one.
        """
        own = self._taken[tenant]
        others = len(self._taken) - (tenant in self._taken)
        return min(self.taken, self._room + own + others * (own + 1))

    def _share(self, tenant: str) -> int:
        """Return how much of the queue a tenant may hold: beside others no more than each, and one who may come."""
        others = len(self._taken) - (tenant in self._taken)
        fair = max(1, self._queue_images // (others + 2)) if others else self._queue_images
        return min(self._tenant_images, fair)

    def _take(self, tenant: str, images: int) -> None:
        self._taken[tenant] += images
        self._all_taken += images
        if not self._taken[tenant]:
            del self._taken[tenant]
        if len(self._taken) > 1:
            self._shared = self._clock()
        if not self.taken:
            self._busy_since = None
        self.metrics.inflight_images.set(self.taken)

    def _count_waiting(self, more: int) -> None:
        self._waiting_images += more
        self.metrics.queue_images.set(self._waiting_images)
        if self._waiting_images:
            self._quiet.clear()
        else:
            self._quiet.set()


def _stopping() -> Draining:
    return Draining("The server is stopping and takes nothing new.", retry_after_s=1.0)


def _fail(items: Iterable[_Item], error: ServiceError) -> None:
    for item in items:
        if not item.future.done():
            item.future.set_exception(error)


_BATCH = 32
_OF_WAIT = 0.1
"""Of the longest wait that is allowed, for a batch on a CPU: everybody else waits for the one that is under way."""


def batch_on(device: torch.device, settings: Settings) -> tuple[int, float]:
    """Return how many images times views an encode batch has on a device at most, and how many seconds it may take.

    The seconds are infinite where the settings say how many images it has, or let calls wait for any time.
    """
    seconds = math.inf
    if device.type == "cpu" and settings.max_wait_ms and not settings.batch_images:
        seconds = _OF_WAIT * settings.max_wait_ms / 1000
    return settings.batch_images or min(_BATCH, settings.queue_images), seconds
