"""What a process that serves asks of its C library."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_MEBIBYTE = 1 << 20
_USES = """
import resource, threading
from service import loop

async def nothing():
    pass

def use():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    block = bytearray(b'x') * (40 << 20)
    del block
    faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

faults = []
loop.run(nothing())
for _ in range(4):
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
print(*faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory as it does")
def test_what_a_batch_gave_back_is_there_for_the_next_one_without_asking_the_system() -> None:
    told = subprocess.run([sys.executable, "-c", _USES], check=True, capture_output=True, text=True, timeout=60)
    first, *later = map(int, told.stdout.split())
    assert first > 40 * _MEBIBYTE // (64 << 10)
    assert max(later) < first / 4
