"""What the C library keeps of memory that was freed: enough for the next batch, and no more than that."""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LOOK_S = 10.0

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1
_MOST_KEPT = 512 << 20
_KEPT_IDLE = 64 << 20
_IDLE_SHARE = 0.05
"""Of one processor: who uses less has no next batch that would be glad of what is kept."""

_MALLOC = {_ARENA_MAX: 1, _MMAP_THRESHOLD: 256 << 20, _TRIM_THRESHOLD: _MOST_KEPT}
"""What `mallopt` is told, by the numbers of malloc.h."""


_USAGE = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Usage(ctypes.Structure):
    """What `mallinfo2` tells, in bytes: `uordblks` are in use in the heap, `hblkhd` beside it."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _USAGE)


class Heap:
    """The heap of this process; where the C library is not glibc, one that does as it does.

    By default glibc returns tensors of some megabytes to the system, which hands out zeroed pages for them again: on
    two cores that took more than a fourth of the time of `lite`. So it is told to keep them. All threads share one
    arena, so that this counts for all. But what lies free between two pieces in use stays with it however large it
    grows, and large pictures leave a lot; that it is told to give back. `clock` tells seconds, and `worked` those that
    this process computed.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, worked: Callable[[], float] = time.process_time
    ) -> None:
        self._library: ctypes.CDLL | None = None
        self._clock, self._worked = clock, worked
        self._other, self._worked_s, self._looked = 0, worked(), clock()
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            for option, value in _MALLOC.items():
                library.mallopt(option, value)
            library.mallinfo2.restype = _Usage
            self._library = library

    def tidy(self) -> bool:
        """Give back what is kept if it is more than the next batch may want; return whether that was so.

        What is resident and not in use is either kept, or was never the heap's; when nothing is kept, all is that.
        """
        most = _KEPT_IDLE if self._idles() else _MOST_KEPT
        if self._library is None or self._unused(self._library) - self._other <= most:
            return False
        self._library.malloc_trim(0)
        self._other = self._unused(self._library)
        return True

    def _idles(self) -> bool:
        """Return whether next to nothing was computed since this was asked last."""
        worked_s, looked = self._worked(), self._clock()
        idles = worked_s - self._worked_s <= _IDLE_SHARE * (looked - self._looked)
        self._worked_s, self._looked = worked_s, looked
        return idles

    @staticmethod
    def _unused(library: ctypes.CDLL) -> int:
        """Return the resident bytes of this process's own that nobody got from the heap."""
        usage: _Usage = library.mallinfo2()
        _, _, told = Path("/proc/self/status").read_text().partition("RssAnon:")
        return int(told.split()[0]) * 1024 - int(usage.uordblks) - int(usage.hblkhd)


async def keep_tidy(heap: Heap) -> None:
    """Look after a heap until cancelled; off the event loop, which would wait for as long as giving back takes."""
    while True:
        await asyncio.sleep(LOOK_S)
        await asyncio.to_thread(heap.tidy)
