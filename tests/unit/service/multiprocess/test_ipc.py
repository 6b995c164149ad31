"""Frames through a real socket: what goes in comes out, in order, and the end of a line is heard at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from service.multiprocess.ipc import Frame, Line, connect

PATIENCE_S = 60.0

SIZES = (0, 1, 11, 12, 13, 4096, 16_371, 16_384, 16_385, 100_000, 1_000_003)
"""Bytes of bodies around what is read at once and what is sent at once."""


class Ends:
    """Two ends of one connection."""

    def __init__(self, near: Line, far: Line) -> None:
        self.near, self.far = near, far


@pytest.fixture
async def path() -> AsyncIterator[str]:
    with TemporaryDirectory(prefix="dmn-") as folder:
        yield str(Path(folder) / "s")


@pytest.fixture
async def ends(path: str) -> AsyncIterator[Ends]:
    met: asyncio.Future[Line] = asyncio.get_running_loop().create_future()
    server = await asyncio.get_running_loop().create_unix_server(lambda: Line(met.set_result), path)
    near = await connect(path)
    far = await met
    yield Ends(near, far)
    near.close()
    far.close()
    server.close()


async def taken(line: Line) -> Frame | None:
    async with asyncio.timeout(PATIENCE_S):
        return await line.receive()


@pytest.mark.parametrize("size", SIZES)
async def test_a_frame_comes_out_as_it_went_in(ends: Ends, size: int) -> None:
    body = np.random.default_rng(size).bytes(size)
    ends.near.send({"id": 7, "told": "façade"}, body)
    frame = await taken(ends.far)
    assert frame is not None
    assert frame.head == {"id": 7, "told": "façade"}
    assert frame.body == body


async def test_frames_of_all_sizes_keep_their_order_both_ways(ends: Ends) -> None:
    sizes = [*SIZES, *reversed(SIZES), *SIZES]

    async def talk(own: Line) -> None:
        for i, size in enumerate(sizes):
            await own.flush()
            own.send({"i": i}, memoryview(bytes([i % 256]) * size))

    async def hear(own: Line) -> None:
        for i, size in enumerate(sizes):
            frame = await taken(own)
            assert frame is not None
            assert frame.head == {"i": i}
            assert frame.body == bytes([i % 256]) * size

    await asyncio.gather(*(turn(line) for line in (ends.near, ends.far) for turn in (talk, hear)))


async def test_a_body_belongs_to_who_receives_it(ends: Ends) -> None:
    sent = bytearray(b"x" * 50_000)
    ends.near.send({}, memoryview(sent))
    frame = await taken(ends.far)
    assert frame is not None
    frame.body[0] = 1
    assert frame.body[1] == ord("x")
    assert sent == b"x" * 50_000


async def test_who_waits_hears_at_once_that_the_other_end_is_gone(ends: Ends) -> None:
    waiting = asyncio.create_task(taken(ends.far))
    await asyncio.sleep(0)
    ends.near.close()
    assert await waiting is None
    assert ends.far.gone
    assert await taken(ends.far) is None


async def test_what_was_sent_before_the_end_still_arrives(ends: Ends) -> None:
    for i in range(3):
        ends.near.send({"i": i}, b"." * 100_000)
    ends.near.close()
    for i in range(3):
        frame = await taken(ends.far)
        assert frame is not None
        assert frame.head == {"i": i}
    assert await taken(ends.far) is None


async def test_a_frame_that_was_cut_off_is_none(ends: Ends) -> None:
    assert ends.near._transport is not None
    ends.near._transport.write(b"\0\0\0\x02\0\0\0\0\0\0\0\x09{}half")
    ends.near.close()
    assert await taken(ends.far) is None


async def test_who_sends_more_than_is_taken_waits_and_goes_on_when_it_is(ends: Ends) -> None:
    sent = 0

    async def talk() -> None:
        nonlocal sent
        while sent < 400:
            await ends.near.flush()
            ends.near.send({"i": sent}, b"." * 200_000)
            sent += 1

    talking = asyncio.create_task(talk())
    before = -1
    while before != sent:  # until the line is full
        before = sent
        for _ in range(100):
            await asyncio.sleep(0)
    assert sent < 400
    for i in range(400):
        frame = await taken(ends.far)
        assert frame is not None
        assert frame.head == {"i": i}
    await talking


async def test_to_send_to_nobody_is_no_fault(ends: Ends) -> None:
    ends.far.close()
    assert await taken(ends.near) is None
    for _ in range(10):
        await ends.near.flush()
        ends.near.send({}, b"nobody hears it")


async def test_who_waits_to_send_goes_on_when_the_other_end_is_gone(ends: Ends) -> None:
    async def talk() -> None:
        while not ends.near.gone:
            await ends.near.flush()
            ends.near.send({}, b"." * 200_000)

    talking = asyncio.create_task(talk())
    for _ in range(200):
        await asyncio.sleep(0)
    ends.far.close()
    async with asyncio.timeout(PATIENCE_S):
        await talking


async def test_where_nobody_listens_there_is_no_line(path: str) -> None:
    with pytest.raises(OSError, match="No such file"):
        await connect(path)
