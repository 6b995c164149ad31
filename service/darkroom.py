"""A bounded pool of threads in which images are developed; `service.images` says how."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from core.encoder import Preprocess

from .images import Developed, ImageLimits, cut, develop


class Darkroom:
    """Turns bytes into pixels of the encoder's size, a few at a time; what waits is bounded by admission."""

    def __init__(self, how: Preprocess, limits: ImageLimits, *, threads: int) -> None:
        self._how, self._limits = how, limits
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="dmn-decode")

    async def develop(self, data: bytes, *, views: int = 1) -> Developed:
        """Return an image's views and its digest; a caller that leaves before its turn costs nothing.

        Raises:
            ImageFault: this image cannot be used; says why.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._pool, lambda: develop(data, views=views, how=self._how, limits=self._limits)
        )

    async def cut(self, data: bytes, *, count: int, seed: int) -> Tensor:
        """Return random crops of an image, (count, 3, s, s), the same for the same seed.

        Raises:
            ImageFault: this image cannot be used; says why.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._pool, lambda: cut(data, count=count, seed=seed, how=self._how, limits=self._limits)
        )

    def close(self) -> None:
        """Let what is being developed end, and stop."""
        self._pool.shutdown(wait=True, cancel_futures=True)
