"""The event loop of a process that serves, and its heaps: Python's, and that of the C library beneath it."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Coroutine
from contextlib import suppress
from typing import TypeVar

import uvloop

T = TypeVar("T")

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1
_MALLOC = {_ARENA_MAX: 1, _MMAP_THRESHOLD: 256 << 20, _TRIM_THRESHOLD: 512 << 20}
"""What `mallopt` is told, by the numbers of malloc.h."""


def run(work: Coroutine[object, object, T]) -> T:
    """Return what some work returns, on a loop that costs less a call than the standard library's."""
    _allow_files()
    _keep_memory()
    return uvloop.run(work)


def settle() -> None:
    """Leave what is there for good out of every later garbage collection; to be called once all is loaded.

    Libraries and models are some million objects. Looking through them again and again took more time than all else
    that a call with a small encoder does, and stopped everybody for it.
    """
    gc.collect()
    gc.freeze()


def _keep_memory() -> None:
    """Have glibc keep what an encoder gives back for the next batch, up to half a gigabyte.

    By default it returns tensors of some megabytes to the system, which hands out zeroed pages for them again: on two
    cores that took more than a fourth of the time of `lite`. All threads share one arena, so it counts for all. Another
    C library has no such call, and does as it does.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC.items():
            mallopt(option, value)


def _allow_files() -> None:
    """Let this process have as many files open as it may: each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
