"""A bounded pool of threads in which images are developed; `service.images` says how."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

from torch import Tensor

from core.encoder import Preprocess

from .images import Developed, ImageLimits, cut, develop
from .turns import Turns

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Job:
    work: Callable[[], Any]
    future: asyncio.Future[Any]


class Darkroom:
    """Turns bytes into pixels of the encoder's size, a few at a time, one of each tenant in turn.

    What waits is bounded by admission. To be made where the event loop runs: results are handed to it together, as
    many as there are, since waking it costs as much as a small image.
    """

    def __init__(self, how: Preprocess, limits: ImageLimits, *, threads: int) -> None:
        self._how, self._limits = how, limits
        self._loop = asyncio.get_running_loop()
        self._guard = threading.Lock()
        self._turns: Turns[_Job] = Turns()
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
        return await self._soon(tenant, lambda: develop(data, views=views, how=self._how, limits=self._limits))

    async def cut(self, data: bytes, *, tenant: str, count: int, seed: int) -> Tensor:
        """Return random crops of an image, (count, 3, s, s), the same for the same seed.

        Raises:
            ImageFault: this image cannot be used; says why.
        """
        return await self._soon(tenant, lambda: cut(data, count=count, seed=seed, how=self._how, limits=self._limits))

    def close(self) -> None:
        """Let what is being developed end, and stop."""
        with self._guard:
            waiting = self._turns.clear()
        for job in waiting:
            job.future.cancel()
        for _ in self._threads:
            self._tokens.put("stop")
        for thread in self._threads:
            thread.join()

    def _soon(self, tenant: str, work: Callable[[], T]) -> asyncio.Future[T]:
        job = _Job(work, self._loop.create_future())
        with self._guard:
            self._turns.put(tenant, job)
        self._tokens.put("next")
        return job.future

    def _work(self) -> None:
        while self._tokens.get() == "next":
            with self._guard:
                job = self._turns.take() if self._turns else None
            if job is not None and not job.future.cancelled():
                self._finish(job)

    def _finish(self, job: _Job) -> None:
        result, error = None, None
        try:
            result = job.work()
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
