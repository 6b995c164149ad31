"""What a process that serves asks of its C library."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory as it does")

_MEBIBYTE = 1 << 20
_USES = """
import resource, threading
from service.server import event_loop

async def nothing():
    pass

def use():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    block = bytearray(b'x') * (40 << 20)
    del block
    faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

faults = []
event_loop.run(nothing())
for _ in range(4):
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
print(*faults)
"""


@GLIBC
def test_what_a_batch_gave_back_is_there_for_the_next_one_without_asking_the_system() -> None:
    told = subprocess.run([sys.executable, "-c", _USES], check=True, capture_output=True, text=True, timeout=60)
    first, *later = map(int, told.stdout.split())
    assert first > 40 * _MEBIBYTE // (64 << 10)
    assert max(later) < first / 4


_LEAVES = """
import json
from pathlib import Path
from service.server.malloc import Heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

passed = {"clock": 0.0, "worked": 0.0}

def busy():
    passed["clock"] += 0.2
    passed["worked"] += 0.2

def idle():
    passed["clock"] += 2.0

def leave(count):
    pieces = [bytearray(b'x') * (1 << 20) for _ in range(2 * count)]
    kept = pieces[::2]  # what is between them stays with the heap
    del pieces
    return kept

def given_back(meanwhile):
    before = resident()
    meanwhile()
    return heap.tidy(), (before - resident()) >> 20

heap = Heap(clock=lambda: passed["clock"], worked=lambda: passed["worked"])
heap.tidy()
few = leave(100)
told = [given_back(busy), given_back(idle)]
many = leave(700)
told += [given_back(busy), [resident() > 800 << 20, len(few) + len(many)]]
print(json.dumps(told))
"""


@GLIBC
def test_what_lies_free_between_pieces_in_use_is_given_back_where_it_is_much_or_nobody_is_at_work() -> None:
    told = subprocess.run([sys.executable, "-c", _LEAVES], check=True, capture_output=True, text=True, timeout=60)
    little, idle, much, kept = json.loads(told.stdout)
    assert little[0] is False
    assert idle[0] is True
    assert idle[1] > 90
    assert much[0] is True
    assert much[1] > 600
    assert kept == [True, 800]
