"""The threads that compute: one for the encoder, and one for memories, so that reading them waits for no batch."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """Runs functions one after the other in its own thread, without blocking the event loop.

    On a CPU torch computes there on so many cores, by default as many as it would. While a worker is open the thread
    that made it computes on one: a second team of threads, were it only to fill a tensor with zeros now and then, makes
    both give up their cores at every step, for as long as the process lives. That took a fourth of the time of `lite`.
    """

    def __init__(self, name: str = "dmn-worker", *, cores: int | None = None) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._began = math.inf
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._thread.submit(_take_cores, cores or self._before).result()

    @property
    def busy_s(self) -> float:
        """For how many seconds it has been at the function that it runs now; 0 if it runs none."""
        return max(0.0, time.monotonic() - self._began)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what the function returns, or raise what it raises. A cancelled caller does not stop it."""

        def inside() -> T:
            self._began = time.monotonic()
            try:
                with torch.inference_mode():
                    return function(*args, **kwargs)
            finally:
                self._began = math.inf

        return await asyncio.get_running_loop().run_in_executor(self._thread, inside)

    def close(self) -> None:
        """Let the running function end, and stop."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._before)


def _take_cores(cores: int) -> None:
    """Have this thread compute on so many cores, whatever other threads are told later."""
    torch.set_num_threads(cores)
    torch.get_num_threads()  # until it was asked once, a thread takes over what was told last to any


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is CUDA where there is one.

    Raises:
        ValueError: torch knows no such device, or the machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {name!r} cannot be used here: {error}") from error
    return device
