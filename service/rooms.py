"""The rooms of the house, furnished: what a use case is handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.encoder import Encoder

from .archive import Archive
from .batching import Batcher
from .darkroom import Darkroom
from .desk import Desk
from .metrics import Metrics
from .settings import Settings
from .stores.base import MemoryStore
from .texts import TextFeatures
from .worker import Worker


@dataclass(frozen=True, kw_only=True, slots=True)
class Rooms:
    """Everything with a life cycle, made and taken down in `service.app`; `clock` is monotonic, in seconds."""

    settings: Settings
    encoder: Encoder
    worker: Worker
    darkroom: Darkroom
    batcher: Batcher
    texts: TextFeatures
    store: MemoryStore
    archive: Archive
    desk: Desk
    metrics: Metrics
    clock: Callable[[], float]
