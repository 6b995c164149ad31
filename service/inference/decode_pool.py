"""A bounded pool of threads in which images are developed; `service.images.decode` says how."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

from torch import Tensor

from core.encoders.protocol import Preprocess
from service.concurrency.fair_queue import Turns
from service.images.decode import Developed, cut, develop
from service.images.errors import Heavy
from service.images.limits import ImageLimits

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Job:
    """Work that is given the bytes of memory that it may take; `cost` are those of a heavy one."""

    tenant: str
    work: Callable[[int], Any]
    future: asyncio.Future[Any]
    cost: int = 0


class Darkroom:
    """Turns bytes into pixels of the encoder's size, a few at a time, one of each tenant in turn.

    What waits is bounded by admission. To be made where the event loop runs: results are handed to it together, as
    many as there are, since waking it costs as much as a small image.

    All threads together take about `room` bytes: half of it is shared out among them, and what takes more than a
    thread's share waits for its part of the other half, of which a single one may take all and more. A file of a
    kilobyte may be an image of hundreds of megabytes.
    """

    def __init__(self, how: Preprocess, limits: ImageLimits, *, threads: int, room: int) -> None:
        self._how, self._limits = how, limits
        self._share, self._room, self._held = room // (2 * threads), room // 2, 0
        self._loop = asyncio.get_running_loop()
        self._guard = threading.Lock()
        self._turns: Turns[_Job] = Turns()
        self._heavy: Turns[_Job] = Turns()
        self._tokens: SimpleQueue[Literal["next", "stop"]] = SimpleQueue()
        self._done: list[tuple[_Job, Any, BaseException | None]] = []
        self._threads = [
            threading.Thread(target=self._work, name=f"dmn-decode-{at}", daemon=True) for at in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def develop(self, data: bytes, *, tenant: str, views: int = 1) -> Developed:
        """Return an image's views and its digest; a caller that leaves before its turn costs nothing.

        Raises:
            ImageFault: this image cannot be used; says why.
        """
        return await self._soon(
            tenant, lambda room: develop(data, views=views, how=self._how, limits=self._limits, room=room)
        )

    async def cut(self, data: bytes, *, tenant: str, count: int, seed: int) -> Tensor:
        """Return random crops of an image, (count, 3, s, s), the same for the same seed.

        Raises:
            ImageFault: this image cannot be used; says why.
        """
        return await self._soon(
            tenant, lambda room: cut(data, count=count, seed=seed, how=self._how, limits=self._limits, room=room)
        )

    def close(self) -> None:
        """Let what is being developed end, and stop."""
        with self._guard:
            waiting = self._turns.clear() + self._heavy.clear()
        for job in waiting:
            job.future.cancel()
        for _ in self._threads:
            self._tokens.put("stop")
        for thread in self._threads:
            thread.join()

    def _soon(self, tenant: str, work: Callable[[int], T]) -> asyncio.Future[T]:
        job = _Job(tenant, work, self._loop.create_future())
        with self._guard:
            self._turns.put(tenant, job)
        self._tokens.put("next")
        return job.future

    def _work(self) -> None:
        while self._tokens.get() == "next":
            job = self._next()
            if job is not None and not job.future.cancelled():
                self._finish(job)
            if job is not None and job.cost:
                self._make_room(job.cost)

    def _next(self) -> _Job | None:
        """Return the job whose turn it is, a heavy one if there is room for it; None where all is done or waits."""
        with self._guard:
            if self._heavy and (not self._held or self._held + self._heavy.first().cost <= self._room):
                job = self._heavy.take()
                self._held += job.cost
                return job
            return self._turns.take() if self._turns else None

    def _make_room(self, cost: int) -> None:
        with self._guard:
            self._held -= cost
            waiting = min(len(self._heavy), len(self._threads))
        for _ in range(waiting):
            self._tokens.put("next")

    def _finish(self, job: _Job) -> None:
        result, error = None, None
        try:
            result = job.work(job.cost or self._share)
        except Heavy as heavy:
            with self._guard:
                self._heavy.put(job.tenant, replace(job, cost=heavy.cost))
            self._tokens.put("next")
            return
        except BaseException as fault:  # noqa: BLE001 - whatever it is, whoever waits must hear of it
            error = fault
        with self._guard:
            self._done.append((job, result, error))
            first = len(self._done) == 1
        if first:
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        with self._guard:
            done, self._done = self._done, []
        for job, result, error in done:
            if job.future.done():
                continue
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
