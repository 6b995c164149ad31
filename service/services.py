"""The rooms of the house, furnished: what a use case is handed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.encoders.protocol import Encoder
from service.access.import_slots import Dock
from service.access.quotas import Quotas
from service.background.jobs import Jobs
from service.background.shadow_queue import Shadows
from service.concurrency.worker_thread import Worker
from service.inference.batching import Batcher
from service.inference.decode_pool import Darkroom
from service.inference.predictor import Desk
from service.memory.cache import Archive
from service.memory.text_features import TextFeatures
from service.stores.protocol import MemoryStore
from service.telemetry.metrics import Metrics

from .settings import Settings

if TYPE_CHECKING:
    from service.telemetry.spans import Spans


@dataclass(frozen=True, kw_only=True, slots=True)
class Rooms:
    """Everything with a life cycle, made and taken down in `service.app`.

    `worker` is the encoder's thread, and that of whatever else takes its time; `reader` is that of hot memories.
    `clock` is monotonic and `wall` is wall time, both in seconds. `carrier` is held by whoever has a whole memory in
    hand: one at a time, so that memory does not fill up. `tutor` is held by who trains on the device. `traces` are None
    while nobody asks for them. `beside` are all rooms of this process, these among them, where it has two encoders, and
    `shadows` the images that wait for the next one (`service.tenants.migration`).
    """

    settings: Settings
    encoder: Encoder
    worker: Worker
    reader: Worker
    darkroom: Darkroom
    batcher: Batcher
    quotas: Quotas
    texts: TextFeatures
    store: MemoryStore
    archive: Archive
    desk: Desk
    jobs: Jobs
    carrier: asyncio.Lock
    dock: Dock
    tutor: asyncio.Lock
    metrics: Metrics
    traces: Spans | None
    clock: Callable[[], float]
    wall: Callable[[], float]
    beside: list[Rooms] = field(default_factory=list, repr=False, compare=False)
    shadows: Shadows | None = None

    def reading(self, fingerprint: str) -> Rooms:
        """Return the rooms of this process whose encoder makes features of that fingerprint; these, if none does."""
        return next((own for own in self.beside if own.encoder.fingerprint == fingerprint), self)
