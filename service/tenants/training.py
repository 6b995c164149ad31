"""Few-shot training of a tenant, Eq. (16), as a job: read the shots, train beside the traffic, swap the offsets in.

Callers come first. A step of the training, or the reading of one image, goes to the worker as any request's work does,
and before each the training waits until no caller is in the server, though not for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.errors import UnfitShots
from core.snapshot import Snapshot
from core.training.recipe import DEFAULT_EPOCHS, Progress, Queries, Recipe, Trained, check, needed_bytes
from core.training.trainer import course
from service.background.jobs import Report
from service.domain.memory import OFFSETS, StoredMemory, StoredOffsets, StoredShot, TenantRecord, Training
from service.domain.records import Job
from service.errors import (
    Contended,
    Internal,
    InvalidRequest,
    LimitExceeded,
    NoClasses,
    NotFound,
    QueueFull,
    ServiceError,
    UnknownTenant,
)
from service.images.errors import ImageFault
from service.memory.convert import encode_offsets, held_bytes, snapshot_of, stack_features
from service.memory.fingerprint import check_fingerprint, origin_of
from service.services import Rooms
from service.stores.protocol import Conflict, ReloadNeeded
from service.telemetry import logs

from . import reindex, snapshots

KIND = "train"
"""What the jobs are called."""

MOST_WAITING = 8
"""Trainings of this process that may be under way or wait for their turn."""

MOST_BYTES = 2 << 30
"""What a training may take of the device's memory: serving goes on beside it."""

_TRIES = 3
_PATIENCE_S = 300.0
_RESCORE_S = 60.0
_BUSY_SHARE = 20.0
_LONGEST_PAUSE_S = 2.0
_LOOK_S = 0.005
_MOST_CROPS = 32
_CROP_BYTES = 256 << 20
_HALF = 2
_READING = 0.9
"""Share of the job that reading takes, where there are images: encoding takes far longer than training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to train; the learning rate is core's where none is given."""

    epochs: int = DEFAULT_EPOCHS
    learning_rate: float | None = None
    seed: int = 0


async def start(rooms: Rooms, tenant: str, options: Options) -> Job:
    """Start to train a tenant's offsets on its shots, and return the job; it waits while another one trains.

    Raises:
        UnknownTenant, NoClasses, FingerprintMismatch: there is nothing to train.
        InvalidRequest: shots are missing, or too unequal; says which.
        LimitExceeded: the tenant has no room for offsets.
        QueueFull: too many trainings wait.
    """
    check_fit(rooms, await _load(rooms, tenant))
    if rooms.jobs.under_way(KIND) >= MOST_WAITING:
        raise QueueFull(f"{MOST_WAITING} trainings are under way or wait for their turn.", retry_after_s=10.0)
    return await rooms.jobs.start(tenant, KIND, partial(_train, rooms, tenant, options), turn=rooms.tutor)


async def remove(rooms: Rooms, tenant: str) -> None:
    """Remove a tenant's trained offsets; stored slots are scored anew without them.

    Raises:
        UnknownTenant, NotFound: there are none.
    """
    for _ in range(_TRIES):
        record = await rooms.archive.record(tenant)
        if record.training is None:
            raise NotFound(f"The tenant {tenant!r} has no trained offsets.")
        with suppress(Conflict):
            await _swap(rooms, record, StoredOffsets())
            await _rescore(rooms, tenant)
            logs.event(logs.OFFSETS_REMOVED, tenant=tenant)
            return
    raise Contended


def check_fit(rooms: Rooms, stored: StoredMemory) -> None:
    """Return if a tenant can be trained.

    Raises:
        NoClasses, FingerprintMismatch, InvalidRequest, LimitExceeded: as for `start`.
    """
    check_fingerprint(stored.record, rooms.encoder)
    classes = stored.record.config.classes
    if not classes:
        raise NoClasses(f"The tenant {stored.record.name!r} has no classes yet.")
    dim = rooms.encoder.dim
    counts = [sum(bool(shot.feature) for shot in stored.shots.get(spec.id, ())) for spec in classes]
    try:
        check(counts)
    except UnfitShots as error:
        raise InvalidRequest(str(error)) from error
    if needed_bytes(counts, dim) > MOST_BYTES:
        raise LimitExceeded(
            f"Training {len(classes)} classes with up to {max(counts)} shots takes about {needed_bytes(counts, dim)} "
            f"bytes; at most {MOST_BYTES} are allowed. Train on fewer shots a class."
        )
    total = held_bytes(stored, dim) - stored.offsets.nbytes + OFFSETS * dim * torch.float32.itemsize * len(classes)
    most = rooms.settings.of(stored.record.name).tenant_max_bytes
    if total > most:
        raise LimitExceeded(f"With offsets the tenant would hold {total} bytes; at most {most} are allowed.")


async def _train(rooms: Rooms, tenant: str, options: Options, report: Report) -> Mapping[str, Any]:
    """Train and swap the result in; anew if classes or shots have changed meanwhile."""
    for _ in range(_TRIES):
        stored = await _load(rooms, tenant)
        check_fit(rooms, stored)
        with suppress(Conflict, ReloadNeeded):
            trained, training = await _learn(rooms, stored, options, report)
            if trained.projection is not None:
                ids = [spec.id for spec in stored.record.config.classes]
                rows = await rooms.worker.run(encode_offsets, trained.projection, ids)
                training = replace(training, id=_id_of(rows))
                # Slots that are scored under other offsets may fall out of a full class.
                await snapshots.before(rooms, tenant, "training")
                await _put_in(rooms, stored, StoredOffsets(training=training, rows=rows))
            logs.event(logs.TRAINED, tenant=tenant, epochs=trained.epochs, shots=training.shots)
            return _told(trained, training)
    raise Contended


async def _learn(rooms: Rooms, stored: StoredMemory, options: Options, report: Report) -> tuple[Trained, Training]:
    config, tau = stored.record.config, rooms.encoder.logit_scale
    text = await rooms.texts.class_weights([config.prompts(spec) for spec in config.classes])
    # Neither slots nor earlier offsets are trained on.
    bare = replace(stored, slots={}, offsets=StoredOffsets())
    snapshot: Snapshot = await rooms.worker.run(snapshot_of, bare, text, tau)
    recipe = Recipe(epochs=options.epochs, learning_rate=options.learning_rate, seed=options.seed)
    shots = [shot for spec in config.classes for shot in stored.shots.get(spec.id, ()) if shot.feature]
    queries, share = await _queries(rooms, stored.record, shots, recipe, report)
    trained = await _steps(rooms, course(snapshot, recipe, queries), share, report)
    about = Training(
        id="",
        created=rooms.wall(),
        seed=recipe.seed,
        epochs=trained.epochs,
        learning_rate=recipe.rate(tau),
        shots=len(shots),
        dim=text.shape[-1],
        before=trained.before,
        after=trained.after,
    )
    return trained, about


async def _steps(rooms: Rooms, steps: Generator[Progress, None, Trained], share: float, report: Report) -> Trained:
    """Take one step after another in the worker; `share` of the job was done before the first."""
    spent = 0.0
    while True:
        await _let_pass(rooms, spent)
        began = rooms.clock()
        told = await rooms.worker.run(_next, steps)
        spent = rooms.clock() - began
        if isinstance(told, Trained):
            return told
        values = {"phase": told.phase, "epoch": told.epoch, "epochs": told.epochs, "loss": told.loss}
        report(share + (1 - share) * told.done, {**values, "held_out_accuracy": told.accuracy})


def _next(steps: Generator[Progress, None, Trained]) -> Progress | Trained:
    try:
        return next(steps)
    except UnfitShots as error:
        raise InvalidRequest(str(error)) from error
    except StopIteration as end:
        trained: Trained = end.value
        return trained


async def _let_pass(rooms: Rooms, spent: float) -> None:
    """Wait until no caller is in the server, or for a multiple of what the last piece of work took."""
    ends = rooms.clock() + min(_LONGEST_PAUSE_S, _BUSY_SHARE * spent)
    while rooms.batcher.taken and rooms.clock() < ends:  # noqa: ASYNC110 - nobody tells when the last caller leaves
        await asyncio.sleep(_LOOK_S)


# Crops of the shots' images -------------------------------------------------------------------------------------------


async def _queries(
    rooms: Rooms, record: TenantRecord, shots: Sequence[StoredShot], recipe: Recipe, report: Report
) -> tuple[Queries | None, float]:
    """Return what each pass trains on, and which share of the job it took; None where no image was kept.

    A shot without an image, or whose image cannot be read any more, stands for itself in every pass. Where the crops of
    all passes would be too many to hold, later passes see those of the first ones again.
    """
    seen = [shot for shot in shots if shot.kept]
    if not seen:
        return None, 0.0
    dim = rooms.encoder.dim
    passes = max(1, min(recipe.epochs, _MOST_CROPS, _CROP_BYTES // (_HALF * dim * len(shots))))
    table: Tensor = await rooms.worker.run(lambda: stack_features(shots, dim).repeat(passes, 1, 1))
    place = {shot.id: at for at, shot in enumerate(shots)}
    for done, shot in enumerate(seen, 1):
        (image,) = await rooms.store.images(record.name, record.stamp, [shot])
        seed = int.from_bytes(hashlib.sha256(f"{recipe.seed}/{shot.id}".encode()).digest()[:8], "big")
        features = None if image is None else await _crops(rooms, record.name, image, passes, seed)
        if features is not None:
            await rooms.worker.run(_put, table, place[shot.id], features)
        report(_READING * done / len(seen), {"phase": "reading", "shots": done})
    return (lambda number: table[number % passes].float()), _READING


def _put(table: Tensor, at: int, features: Tensor) -> None:
    table[:, at] = features.to(table)


async def _crops(rooms: Rooms, tenant: str, image: bytes, count: int, seed: int) -> Tensor | None:
    """Return the features (count, d) of random crops of an image; None if it cannot be read."""
    features: list[Tensor] = []
    try:
        pixels = await rooms.darkroom.cut(image, tenant=tenant, count=count, seed=seed)
        spent = 0.0
        for view in pixels.split(1):
            # One at a time: a caller that comes meanwhile waits for one crop and no more.
            await _let_pass(rooms, spent)
            began = rooms.clock()
            features.append(await _encoded(rooms, tenant, view))
            spent = rooms.clock() - began
    except (ImageFault, Internal):
        return None
    return await rooms.worker.run(lambda: torch.cat(features))


async def _encoded(rooms: Rooms, tenant: str, view: Tensor) -> Tensor:
    deadline = rooms.clock() + _PATIENCE_S
    while True:
        try:
            with rooms.batcher.admit(1, tenant=tenant):
                return await rooms.batcher.encode(view, tenant=tenant, deadline=deadline, laps=[])
        except QueueFull as full:
            if rooms.clock() > deadline:
                raise
            await asyncio.sleep(full.retry_after_s or 1.0)  # callers come first


# What becomes of it ---------------------------------------------------------------------------------------------------


async def _put_in(rooms: Rooms, stored: StoredMemory, offsets: StoredOffsets) -> None:
    """Swap offsets in and have the slots scored under them; whoever cancels that gets the former ones back.

    Raises:
        Conflict: as for `_swap`.
    """
    tenant, swapping = stored.record.name, asyncio.create_task(_swap(rooms, stored.record, offsets))
    try:
        await asyncio.shield(swapping)
        await _rescore(rooms, tenant)
    except asyncio.CancelledError:
        await asyncio.wait((swapping,))
        if not swapping.cancelled() and swapping.exception() is None:
            with suppress(Conflict, ServiceError):  # changed since, by someone else
                await _swap(rooms, await rooms.archive.record(tenant), stored.offsets)
                await _rescore(rooms, tenant)
        raise


async def _swap(rooms: Rooms, record: TenantRecord, offsets: StoredOffsets) -> None:
    """Put offsets in the place of the present ones, for all who read at once.

    Raises:
        Conflict: classes or shots have changed since the record was read; nothing was written.
    """
    async with rooms.archive.exclusive(record.name):
        await rooms.store.replace(
            record.name,
            record.config,
            record.fingerprint,
            expected=record.stamp,
            labelling=record.labelling,
            origin=origin_of(rooms.encoder),
            offsets=offsets,
        )
        rooms.archive.drop(record.name)


async def _rescore(rooms: Rooms, tenant: str) -> None:
    """Have the slots scored under the new offsets, and wait a while for it; if it fails, whoever reads tries again."""
    with suppress(ServiceError):
        job = await reindex.resume(rooms, tenant)
        if job is not None:
            await rooms.jobs.wait(job.id, _RESCORE_S)


async def _load(rooms: Rooms, tenant: str) -> StoredMemory:
    stored = await rooms.store.load(tenant)
    if stored is None:
        raise UnknownTenant(f"There is no tenant {tenant!r}.")
    return stored


def _id_of(rows: Mapping[str, bytes]) -> str:
    """Return a hash of offsets: the same ones label the same."""
    return hashlib.sha256(b"".join(own.encode() + row for own, row in sorted(rows.items()))).hexdigest()[:20]


def _told(trained: Trained, training: Training) -> dict[str, Any]:
    """Return what a job's result says of a training; one that came to nothing has no id, and a reason."""
    told = {name: value for name, value in asdict(training).items() if name not in ("created", "before", "after")}
    held_out = None if trained.before is None else {"before": trained.before, "after": trained.after}
    told |= {"trained": bool(training.id), "held_out": held_out, "losses": list(trained.losses)}
    if training.id:
        return told
    reason = "No pass over the shots made the loss on those held out lower: they are better used untrained."
    return {**told, "id": None, "reason": reason}
