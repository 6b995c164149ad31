"""The darkroom: whatever is sent, its threads together take about as much memory as they may."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from PIL import Image

from core.encoders.protocol import Preprocess
from service.images.decode import decode, develop
from service.images.errors import Heavy, ImageUnreadable
from service.images.limits import ImageLimits
from service.inference import decode_pool
from service.inference.decode_pool import Darkroom
from tests.support.fakes import picture

HOW = Preprocess(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
PATIENCE_S = 60.0
THREADS = 4
SIDE = 64
COST = 16 * SIDE * SIDE
"""Of a WebP of that side."""


def webp(side: int = SIDE, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, "WEBP", **options)
    return file.getvalue()


@asynccontextmanager
async def opened(room: int) -> AsyncIterator[Darkroom]:
    room_ = Darkroom(HOW, ImageLimits(), threads=THREADS, room=room)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield room_
    finally:
        await asyncio.to_thread(room_.close)


class Watched:
    """`develop`, which counts the heavy ones that are at work together, and lets them go when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.together, self.most, self._now, self._guard = (
            Counter[bool](),
            Counter[bool](),
            Counter[bool](),
            threading.Lock(),
        )
        self.go, self.began = threading.Event(), threading.Semaphore(0)
        monkeypatch.setattr(decode_pool, "develop", self)

    def __call__(self, data: bytes, *, room: int, **more: Any) -> Any:
        done = develop(data, room=room, **more)
        heavy = data.startswith(b"RIFF")
        with self._guard:
            self._now[heavy] += 1
            self.most[heavy] = max(self.most[heavy], self._now[heavy])
        self.began.release()
        if heavy:
            assert self.go.wait(PATIENCE_S)
        with self._guard:
            self._now[heavy] -= 1
        return done


@pytest.mark.parametrize(("room", "together"), [(2 * COST - 1, 1), (2 * COST, 1), (4 * COST, 2), (7 * COST, 3)])
async def test_heavy_images_are_decoded_together_as_far_as_there_is_room_and_one_always(
    monkeypatch: pytest.MonkeyPatch, room: int, together: int
) -> None:
    watched = Watched(monkeypatch)
    async with opened(room) as house:
        heavy = [asyncio.ensure_future(house.develop(webp(), tenant="a")) for _ in range(9)]
        for _ in range(together):
            await asyncio.to_thread(watched.began.acquire, timeout=PATIENCE_S)
        watched.go.set()
        await asyncio.gather(*heavy)
    assert watched.most[True] == together


async def test_light_images_of_others_do_not_wait_for_heavy_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    async with opened(4 * COST) as house:
        heavy = [asyncio.ensure_future(house.develop(webp(), tenant="a")) for _ in range(30)]
        await asyncio.to_thread(watched.began.acquire, timeout=PATIENCE_S)
        for _ in range(5):
            await house.develop(picture("red"), tenant="b")
        watched.go.set()
        await asyncio.gather(*heavy)


async def test_heavy_images_that_nobody_waits_for_any_more_and_such_that_fail_leave_their_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched(monkeypatch)
    async with opened(2 * COST) as house:
        left = [asyncio.ensure_future(house.develop(webp(), tenant="a")) for _ in range(9)]
        await asyncio.to_thread(watched.began.acquire, timeout=PATIENCE_S)
        for one in left:
            one.cancel()
        watched.go.set()
        for _ in range(3):
            with pytest.raises(ImageUnreadable):
                await house.develop(webp(lossless=True)[:30].ljust(60, b"\0"), tenant="a")
        await house.develop(webp(), tenant="a")


@pytest.mark.parametrize(
    "data",
    [
        webp(),
        webp(lossless=True),
        webp(mode="RGBA"),
        webp(save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE), "red")]),
    ],
    ids=["lossy", "lossless", "transparent", "animated"],
)
def test_a_webp_says_what_it_takes_before_a_parser_sees_it(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ImageLimits()
    monkeypatch.setattr("service.images.decode.PARSERS", {})
    with pytest.raises(Heavy) as heavy:
        decode(data, limits, COST - 1)
    assert heavy.value.cost == COST


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_what_takes_more_than_there_is_room_for_is_not_decoded(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(file, kind)
    with pytest.raises(Heavy):
        decode(file.getvalue(), ImageLimits(), 8 * SIDE * SIDE - 1)
    assert decode(file.getvalue(), ImageLimits(), 8 * SIDE * SIDE).size == (SIDE, SIDE)
