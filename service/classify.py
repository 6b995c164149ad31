"""The hall: one call through all rooms. The only place that knows their order.

bytes ──darkroom──> pixels ──batcher──> features ──desk──> reading
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from service.domain.quotas import check_count
from service.images.decode import Developed
from service.images.errors import ImageFault
from service.inference.results import Question, Reading
from service.telemetry.metrics import Lap

from .errors import DeadlineExceeded, Internal, LimitExceeded, NoClasses, ServiceError
from .services import Rooms
from .telemetry import logs
from .tenants import reindex

T = TypeVar("T")

Fault = ServiceError | ImageFault
"""Why one image has no answer."""


class Delivery(Protocol):
    """An image that another process develops, once it is asked to: nobody decodes what is not let in."""

    async def developed(self) -> Developed:
        """Return its views.

        Raises:
            ImageFault, ServiceError: it cannot be used; says why.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyCall:
    """What a caller asks: images as they came, in order (or why one did not arrive), and how to answer.

    `deadline` is a moment of the rooms' clock.
    """

    tenant: str
    images: Sequence[bytes | ImageFault | Delivery]
    learn: bool
    views: int
    explain: bool
    deadline: float
    top_k: int = 5


async def classify(rooms: Rooms, call: ClassifyCall) -> list[Reading | Fault]:
    """Return a reading or a fault for each image, in order; one image's fault never fails its neighbours.

    Raises:
        ServiceError: the whole call is refused, and nothing was decoded.
    """
    check_count(len(call.images), rooms.settings)
    if call.views > rooms.settings.max_views:
        raise LimitExceeded(f"{call.views} views were asked for; at most {rooms.settings.max_views} are allowed.")
    laps: list[list[Lap]] = [[] for _ in call.images]
    images = len(call.images) * call.views
    with rooms.batcher.admit(images, tenant=call.tenant, deadline=call.deadline):
        await _check_tenant(rooms, call.tenant)
        async with rooms.quotas.admit(call.tenant, images):
            results = await _answers(rooms, call, laps)
    count_faults(rooms, results)
    if rooms.traces is not None:
        told = (result.laps if isinstance(result, Reading) else () for result in results)
        rooms.traces.stages([whole or own for whole, own in zip(told, laps, strict=True)])
    if any(isinstance(result, Reading) and result.due for result in results):
        with suppress(ServiceError):  # the answer stands; the next one who meets the memory tries again
            await reindex.resume(rooms, call.tenant)
    return results


async def _answers(rooms: Rooms, call: ClassifyCall, laps: Sequence[list[Lap]]) -> list[Reading | Fault]:
    walks = [partial(_encode, rooms, call, *one) for one in zip(call.images, laps, strict=True)]
    if len(walks) == 1:  # the commonest call goes its way at one go

        async def whole() -> Reading:
            return await _read(rooms, call, await walks[0]())

        return [await _own_fate(whole, rooms, call.deadline)]
    encoded = await each(walks, rooms, call.deadline)
    # Started in order and not before all are encoded: the memory meets the images of a call as they were sent.
    return await each([partial(_read, rooms, call, one) for one in encoded], rooms, call.deadline)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoded:
    """An image on its way to the desk, and its laps so far."""

    question: Question
    laps: list[Lap]


async def _encode(rooms: Rooms, call: ClassifyCall, image: bytes | ImageFault | Delivery, laps: list[Lap]) -> _Encoded:
    if isinstance(image, ImageFault):
        raise image
    with rooms.metrics.stage("decode", laps):
        if isinstance(image, bytes):
            developed = await rooms.darkroom.develop(image, tenant=call.tenant, views=call.views)
        else:
            developed = await image.developed()
    features = await rooms.batcher.encode(developed.pixels, tenant=call.tenant, deadline=call.deadline, laps=laps)
    question = Question(
        views=features, digest=developed.digest, learn=call.learn, explain=call.explain, top_k=call.top_k
    )
    return _Encoded(question=question, laps=laps)


async def _read(rooms: Rooms, call: ClassifyCall, encoded: _Encoded | Fault) -> Reading:
    if not isinstance(encoded, _Encoded):
        raise encoded
    reading = await rooms.desk.ask(call.tenant, encoded.question)
    reading.laps[:0] = encoded.laps
    rooms.metrics.predictions.labels(_agreement(reading)).inc()
    return reading


async def each(walks: Sequence[Callable[[], Awaitable[T]]], rooms: Rooms, deadline: float) -> list[T | Fault]:
    """Return what each image's walk returns, or its own fault; those not done by the deadline are given up."""
    return await asyncio.gather(*(_own_fate(walk, rooms, deadline) for walk in walks))


async def _own_fate(walk: Callable[[], Awaitable[T]], rooms: Rooms, deadline: float) -> T | Fault:
    try:
        return await _in_time(walk, rooms, deadline)
    except (ServiceError, ImageFault) as fault:
        return fault
    except Exception as error:  # noqa: BLE001 - a fault of ours with one image is no fault of its neighbours
        logs.event(logs.FAILED, level=logging.ERROR, error=error)
        return Internal("An unexpected error occurred with this image.")


def count_faults(rooms: Rooms, results: Sequence[object]) -> None:
    """Count the images that failed, by problem."""
    for result in results:
        if isinstance(result, ServiceError | ImageFault):
            rooms.metrics.image_errors.labels(result.slug).inc()


async def _in_time(walk: Callable[[], Awaitable[T]], rooms: Rooms, deadline: float) -> T:
    try:
        async with asyncio.timeout(max(0.0, deadline - rooms.clock())):
            return await walk()
    except TimeoutError as error:
        raise DeadlineExceeded("The deadline passed before the image was answered.") from error


async def _check_tenant(rooms: Rooms, tenant: str) -> None:
    """Refuse a call that no memory can answer before anything is decoded."""
    if not (await rooms.archive.config(tenant)).classes:
        raise NoClasses(f"The tenant {tenant!r} has no classes yet.")


def _agreement(reading: Reading) -> str:
    """Return which branches have the same first label."""
    text, dynamic, static = (own and own.label for own in (reading.text, reading.dynamic, reading.static))
    if text == dynamic and static in (None, text):
        return "all"
    if text == dynamic:
        return "text_dynamic"
    if text == static:
        return "text_static"
    return "dynamic_static" if dynamic == static else "none"
