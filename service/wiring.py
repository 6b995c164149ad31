"""Builds and closes everything that has a life cycle: encoders, store, caches, workers, background tasks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from prometheus_client import CollectorRegistry, disable_created_metrics

from core.encoders import openclip
from core.encoders.protocol import Encoder
from core.encoders.towers.backends import Runtime
from service.access.import_slots import Dock
from service.access.quotas import Quotas
from service.background.jobs import Jobs
from service.background.shadow_queue import Shadows
from service.concurrency.worker_thread import Worker, choose_device
from service.images.limits import ImageLimits
from service.inference.batching import Batcher, batch_on
from service.inference.decode_pool import Darkroom
from service.inference.predictor import Desk
from service.memory.cache import Archive
from service.memory.text_features import TextFeatures
from service.stores.embedded.binary import free_bytes, resolve_store
from service.stores.factory import open_store
from service.stores.instrumented import watched
from service.stores.protocol import MemoryStore
from service.telemetry.metrics import Metrics, divided
from service.tenants.maintenance import keep_house
from service.tenants.shadow_memory import Filler

from .services import Rooms
from .settings import Settings
from .telemetry import logs, tracing
from .tenants import configuration

if TYPE_CHECKING:  # loaded only while traces are on
    from service.telemetry.spans import Spans

NAME = "dmn-clip-service"

Threads = tuple[Worker, Worker]
"""That of the device, and that of the memories."""


@asynccontextmanager
async def open_rooms(
    settings: Settings,
    encoder: Encoder | None = None,
    following: Encoder | None = None,
    *,
    clock: Callable[[], float] | None = None,
) -> AsyncIterator[Rooms]:
    """Furnish the rooms, and take them down again: work in flight first, then the worker, then the store.

    Where the settings name a next encoder there are rooms of that one too, `Rooms.beside` these. The two encoders are
    loaded if they are not given. `clock` is monotonic, in seconds; without one it is that of the machine.

    Raises:
        EncoderUnavailable: an encoder cannot be had.
        FingerprintMismatch: the store is of another format.
        StoreDown: the store does not answer, or cannot be started.
        ValueError: the device cannot be used, traces cannot be sent, or both encoders give the same features.
    """
    settings = resolve_store(settings)
    worker = Worker()
    reader = Worker("dmn-reader", cores=1)
    try:
        device = choose_device(settings.device)
        # First what fails fast: an encoder takes its time.
        async with tracing.opened(settings) as traces, open_store(settings) as store:
            encoders = [await worker.run(load_encoder, settings, device) if encoder is None else encoder]
            if settings.next_encoder and following is None:
                following = await worker.run(load_encoder, _of_next(settings), device)
            encoders += [] if following is None else [following]
            rooms = _furnish(settings, encoders, (worker, reader), store, traces, clock or time.monotonic)
            for own in encoders:
                await worker.run(_warm_up, own)
            await configuration.ensure_default(rooms)
            async with _kept(rooms):
                logs.event(logs.STARTED, encoder=encoders[0].name, device=str(device), store=settings.store_kind)
                yield rooms
    finally:
        reader.close()
        worker.close()


@asynccontextmanager
async def _kept(rooms: Rooms) -> AsyncIterator[None]:
    """Take images in, and see to what nobody asks for; then answer what is in flight and write what was learned."""
    houses = rooms.beside or [rooms]
    for own in houses:
        own.batcher.start()
    duties = [keep_house(own) for own in houses]
    filler = None
    if rooms.beside:
        filler = Filler(rooms, rooms.beside[1], _shadow_desk(rooms.beside[1]))
        duties.append(filler.run())
    tasks = [asyncio.create_task(duty, name="dmn-housekeeping") for duty in duties]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await rooms.jobs.aclose()
        if filler is not None:
            await filler.aclose()
        for own in reversed(houses):
            await _leave(own)
        logs.event(logs.STOPPED)


def load_encoder(settings: Settings, device: torch.device) -> Encoder:
    """Return the encoder that the settings name, run as they say.

    Raises:
        EncoderUnavailable: it cannot be had, or cannot be run so.
    """
    runtime = Runtime(
        backend=settings.encoder_backend,
        dtype=settings.encoder_dtype,
        cache=settings.cache_dir,
        most=batch_on(device, settings)[0],
        notice=lambda what: logs.event(logs.ENCODER_SLOWER, level=logging.WARNING, why=what),
    )
    return openclip.load(settings.encoder, device=device, runtime=runtime)


async def _leave(rooms: Rooms) -> None:
    await rooms.batcher.aclose()
    await rooms.desk.drain()
    await rooms.archive.settle(everything=True)
    await rooms.quotas.aclose()
    rooms.darkroom.close()


def _furnish(
    settings: Settings,
    encoders: Sequence[Encoder],
    threads: Threads,
    store: MemoryStore,
    traces: Spans | None,
    clock: Callable[[], float],
) -> Rooms:
    """Return the rooms of the first encoder, with those of the next one, if there is one, beside them."""
    disable_created_metrics()  # a second series beside each counter, which nobody asks for
    first, metrics = encoders[0], Metrics(CollectorRegistry())
    store = watched(store, metrics, clock, partial(_has_room, settings))
    metrics.build_info.labels(version(NAME), first.name, first.fingerprint[:12]).set(1)
    if len(encoders) == 1:
        return _rooms(settings, first, threads, store, metrics, traces, clock)
    if first.fingerprint == encoders[1].fingerprint:
        raise ValueError("DMN_NEXT_ENCODER gives the same features as DMN_ENCODER: there is nothing to move.")
    own, others = divided(metrics, among=2)
    beside: list[Rooms] = []
    shadows = Shadows(max_bytes=settings.next_queue_bytes)
    rooms = replace(_rooms(settings, first, threads, store, own, traces, clock), beside=beside, shadows=shadows)
    # What is one for the whole process stays one.
    shared = {name: getattr(rooms, name) for name in ("jobs", "quotas", "carrier", "dock", "tutor")}
    following = replace(
        _rooms(_of_next(settings), encoders[1], threads, store, others, traces, clock), beside=beside, **shared
    )
    beside += [rooms, following]
    return rooms


def _of_next(settings: Settings) -> Settings:
    """Return the settings as they are for the rooms of the next encoder."""
    return settings.model_copy(update={"encoder": settings.next_encoder})


def _rooms(
    settings: Settings,
    encoder: Encoder,
    threads: Threads,
    store: MemoryStore,
    metrics: Metrics,
    traces: Spans | None,
    clock: Callable[[], float],
) -> Rooms:
    worker, reader = threads
    batch_images, batch_s = batch_on(encoder.device, settings)
    limits = ImageLimits(
        max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels, formats=settings.image_formats
    )
    batcher = Batcher(
        worker,
        encoder.encode_images,
        metrics,
        clock,
        batch_images=batch_images,
        batch_s=batch_s,
        queue_images=settings.queue_images,
        tenant_images=settings.tenant_queue_images,
        wait_s=settings.batch_wait_ms / 1000,
        max_wait_s=settings.max_wait_ms / 1000,
    )
    texts = TextFeatures(worker, encoder.encode_texts, max_bytes=settings.text_cache_bytes)
    archive = Archive(
        store,
        encoder,
        texts,
        reader,
        metrics,
        clock,
        max_bytes=settings.hot_memory_bytes,
        sync_s=settings.sync_ms / 1000,
        serve_stale=settings.store_down == "serve",
    )
    desk = Desk(
        archive,
        store,
        reader,
        metrics,
        tenant_max_bytes=lambda tenant: settings.of(tenant).tenant_max_bytes,
        pending_images=settings.pending_images,
        serve_stale=settings.store_down == "serve",
    )
    return Rooms(
        settings=settings,
        encoder=encoder,
        worker=worker,
        reader=reader,
        darkroom=Darkroom(encoder.preprocess, limits, threads=settings.decode_workers, room=settings.decode_bytes),
        batcher=batcher,
        quotas=Quotas(store, settings, clock),
        texts=texts,
        store=store,
        archive=archive,
        desk=desk,
        jobs=Jobs(store, metrics, time.time),
        carrier=asyncio.Lock(),
        dock=Dock(max_bytes=settings.max_import_bytes),
        tutor=asyncio.Lock(),
        metrics=metrics,
        traces=traces,
        clock=clock,
        wall=time.time,
    )


def _shadow_desk(rooms: Rooms) -> Desk:
    """Return a desk for what nobody asked: no metric tells of it, and nothing of it waits for a store that is away."""
    return Desk(
        rooms.archive,
        rooms.store,
        rooms.reader,
        Metrics(CollectorRegistry()),
        tenant_max_bytes=lambda tenant: rooms.settings.of(tenant).tenant_max_bytes,
    )


def _has_room(settings: Settings) -> bool:
    """Return whether the embedded store may write more: a store elsewhere looks after its disk itself."""
    return settings.store != "embedded" or free_bytes(settings.data_dir) >= settings.min_free_bytes


def _warm_up(encoder: Encoder) -> None:
    """Run both towers once, so that the first caller does not pay for what is set up lazily."""
    size = encoder.preprocess.size
    encoder.encode_images(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    encoder.encode_texts(["a photo."])
