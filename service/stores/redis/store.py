"""The store in Redis or Valkey: one node, Sentinel or a cluster; `connection` has the client.

What has to be one step is a script in `lua/`. A bank, the dynamic slots of a tenant, is written aside in slices and
then switched to, so that no call keeps the server from others for long; banks that were left are swept.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha1
from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError
from redis.exceptions import TimeoutError as RedisTimeoutError

from core.memory.dynamic import Outcome
from service.domain.memory import (
    OFFSETS,
    SEED,
    Count,
    Stamp,
    StoredBank,
    StoredMemory,
    StoredOffsets,
    StoredShot,
    StoredStatistics,
    TenantRecord,
    shown_of,
)
from service.domain.quotas import Allowance, Lease, Quota
from service.domain.records import Job, Remembered, SnapshotInfo, StoredKey, tenant_of_key
from service.domain.tenant import TenantConfig, is_shadow
from service.errors import Contended, StoreAway, StoreDown
from service.stores.connection.checks import check
from service.stores.connection.errors import FAULTS, down
from service.stores.protocol import Conflict, PushCandidate, Pushed, ReloadNeeded, Synced, Verdict

from .commands import SLICE_BYTES, SWEEP_KEYS, slices, slices_by_size
from .documents import JOBS, UNFINISHED_S
from .formats import FORMAT, FORMATS, check_major, format_of, other_format
from .keys import KEYED, MAJOR, TENANTS, Keys
from .quotas import Limits
from .reader import SLICES_AHEAD
from .records import (
    FEATURE_BYTES,
    Locations,
    changed_banks,
    classes_per_slice,
    owner_of,
    parse_bank,
    parse_change,
    parse_job,
    parse_key,
    parse_key_or_fault,
    parse_owner,
    parse_record,
    parse_snapshot_info,
    parse_stamp,
    stamp_or_none,
    text_or_none,
)
from .statistics import Counters

Reply = Any
"""What redis-py gives for a script: nested lists of bytes and integers."""

LOG_LENGTH = 2048
"""Slot changes that `lua/push.lua` keeps for workers that are behind."""
_TRIES = 16


class RedisStore:
    """A `MemoryStore` in Redis 6.2 or Valkey, or newer.

    `clock` is wall time in seconds, the same for all workers. `spread` says that it is a cluster, of which a node may
    be away while the others are there.
    """

    def __init__(
        self,
        client: Redis,
        *,
        clock: Callable[[], float],
        remember_s: float,
        remember_bytes: int,
        spread: bool = False,
    ) -> None:
        self._client: Any = client
        self._spread = spread
        self._clock, self._remember_s, self._remember_bytes = clock, remember_s, remember_bytes
        self._scripts = {file.name: file.read_text() for file in files(__package__).joinpath("lua").iterdir()}
        self._known: dict[tuple[str, int], Locations] = {}
        self._counters = Counters(self._client, self._run, self._do, clock)
        self._limits = Limits(self._run)

    async def get(self, tenant: str) -> TenantRecord | None:
        fields = await self._do(self._client.hgetall(Keys(tenant).config))
        return parse_record(fields) if fields else None

    async def names(self, *, after: str, limit: int) -> Sequence[str]:
        first = f"({after}" if after else "-"
        found = await self._do(self._client.zrangebylex(TENANTS, first, "+", start=0, num=limit))
        return [name.decode() for name in found]

    async def load(self, tenant: str, *, images: bool = False) -> StoredMemory | None:
        for _ in range(_TRIES):
            fields = await self._do(self._client.hgetall(Keys(tenant).config))
            if not fields:
                return None
            try:
                return await self._load(tenant, parse_record(fields), Locations.of(fields), images=images)
            except ReloadNeeded:
                continue  # the tenant began a new life while its slices were read
        raise Contended

    async def stamps(self, tenants: Sequence[str]) -> Sequence[Stamp | StoreDown | None]:
        pipeline = self._client.pipeline(transaction=False)
        for tenant in tenants:
            pipeline.hmget(Keys(tenant).config, "epoch", "version", "mark")
        found = await self._do(pipeline.execute(raise_on_error=not self._spread))
        return [self._fault(one) if isinstance(one, Exception) else stamp_or_none(*one) for one in found]

    async def replace(
        self,
        tenant: str,
        config: TenantConfig,
        fingerprint: str,
        *,
        expected: Stamp | None,
        exact: bool = False,
        labelling: str,
        origin: Mapping[str, str],
        slots: Mapping[str, StoredBank] | None = None,
        barred: Iterable[tuple[str, str]] = (),
        shots: Iterable[StoredShot] | None = None,
        offsets: StoredOffsets | None = None,
        statistics: StoredStatistics | None = None,
    ) -> Stamp:
        keys = Keys(tenant)
        known = await self._do(self._client.hgetall(keys.config))
        old = parse_record(known) if known else None
        if (old.stamp.epoch if old else None) != (expected.epoch if expected else None):
            raise Conflict(tenant)
        # Before the tenant is there: a name without a tenant harms nobody, a tenant without a name would be lost.
        await self._list(tenant)
        epoch = int(await self._do(self._client.incr(keys.epochs)))
        present = Locations.of(known) if known else Locations(bank=epoch, pile=epoch)
        stay = {spec.id for spec in config.classes}
        leaves = [spec.id for spec in old.config.classes if spec.id not in stay] if old else []
        if old is None or old.fingerprint != fingerprint:
            slots, offsets = slots or {}, offsets or StoredOffsets()
        if slots is None:
            await self._note_bank(keys, present.bank, stay.union(leaves))
        else:
            await self._write_bank(keys, epoch, slots, barred, stay)
        kept = None if shots is None and old else [shot for shot in shots or () if shot.class_id in stay]
        if kept is not None:
            await self._write_pile(keys, epoch, kept)
        training = old.training.without(leaves) if old and old.training else None
        if offsets is not None:
            training = offsets.training
        if offsets is not None and training is not None:
            await self._write_frame(keys, epoch, {own: row for own, row in offsets.rows.items() if own in stay})
        frame = present.frame if offsets is None else epoch
        read = Locations(
            bank=present.bank if slots is None else epoch,
            pile=present.pile if kept is None else epoch,
            frame=0 if training is None else frame,
            life=present.life if slots is None else epoch,
        )
        if read.life == epoch and statistics is not None and statistics.shared:
            await self._counters.plant(keys, epoch, SEED, statistics)
        at = ("", "") if expected is None else (expected.epoch, expected.version)
        about = (
            format_of(config, training),
            tenant,
            config.to_json(),
            fingerprint,
            json.dumps(dict(origin)),
            labelling,
            config.slots,
            repr(self._clock()),
        )
        touched = (
            keys.config,
            keys.log,
            *keys.shots(present.pile),
            keys.offsets(present.frame),
            *keys.every_slot(present.bank, leaves),
        )
        trained = (read.frame, "" if training is None else json.dumps(asdict(training)))
        shown = "-" if kept is None else shown_of(shot.id for shot in kept)
        args = (*at, int(exact), epoch, read.bank, read.pile, *about, *trained, read.life, shown, *leaves)
        told = await self._run("replace.lua", touched, args)
        if told[0] < 0:
            # By the ids at hand: whoever was faster may have swept the list of them, while this was still writing.
            await self._remove_written(keys, f"b{epoch}", stay)
            await self._remove_written(keys, f"s{epoch}")
            await self._remove_frame(keys, epoch)
            await self._counters.remove(keys, epoch)
            raise Conflict(tenant)
        if leaves and read.life == present.life:
            await self._counters.forget(keys, read.life, leaves)
        await self._sweep(keys, epoch, read)
        return parse_stamp(epoch, *told)

    async def delete(self, tenant: str) -> bool:
        keys = Keys(tenant)
        # Before the tenant goes: one of its name that is made meanwhile has a later one.
        epoch = int(await self._do(self._client.get(keys.epochs)) or 0)
        touched = (keys.config, keys.snapshots, keys.api_keys, keys.log, keys.jobs, *keys.answers)
        told = await self._run("delete.lua", touched, FORMATS)
        if told[0] < 0:
            raise other_format(f"The tenant {tenant!r}")
        await self._do(self._client.zrem(TENANTS, tenant))
        await self._unlist(tenant)
        for id_ in told[1:]:
            await self._do(self._client.unlink(keys.snapshot(id_.decode())))
        await self._sweep(keys, epoch + 1)
        return bool(told[0])

    async def count(self, tenant: str, at: Stamp, counter: str, seq: int, statistics: StoredStatistics) -> int:
        life = (await self._places(tenant, at.epoch)).life
        return await self._counters.write(Keys(tenant), at.epoch, life, counter, seq, statistics)

    async def counts(
        self, tenant: str, at: Stamp, known: Mapping[str, int]
    ) -> tuple[Mapping[str, Count], Mapping[str, float]]:
        life = (await self._places(tenant, at.epoch)).life
        found = await self._counters.read(Keys(tenant), life, known)
        if int(await self._do(self._client.hget(Keys(tenant).config, "epoch")) or 0) != at.epoch:
            raise ReloadNeeded(tenant)
        return found

    async def fold(self, tenant: str, at: Stamp, counts: Mapping[str, Count], into: str) -> bool:
        life = (await self._places(tenant, at.epoch)).life
        return await self._counters.fold(Keys(tenant), at.epoch, life, counts, into)

    async def sync(self, tenant: str, since: Stamp) -> Synced:
        return (await self.push(tenant, since, ())).synced

    async def push(self, tenant: str, since: Stamp, candidates: Sequence[PushCandidate]) -> Pushed:
        keys = Keys(tenant)
        named = list(dict.fromkeys(candidate.class_id for candidate in candidates))
        number = {class_id: at for at, class_id in enumerate(named, 1)}
        args: list[str | bytes | float] = [f"{since.epoch} {since.version} {since.mark}"]
        for candidate in candidates:
            slot = candidate.slot
            args += [number[candidate.class_id], slot.id, struct.pack("<d", slot.entropy) + slot.feature]
        bank = (await self._places(tenant, since.epoch)).bank if named else 0
        touched = (keys.config, keys.log, *keys.every_slot(bank, named))
        reply = await self._run("push.lua", touched, args)
        if not reply[0]:
            raise ReloadNeeded(tenant)
        verdicts = tuple(
            Verdict(outcome=Outcome(told.decode()), evicted=text_or_none(evicted)) for told, evicted in reply[2]
        )
        changes = tuple(parse_change(*values) for values in reply[3])
        stamp = parse_stamp(since.epoch, reply[1], reply[4])
        return Pushed(verdicts=verdicts, synced=Synced(stamp=stamp, changes=changes))

    async def add_shots(
        self, tenant: str, since: Stamp, shots: Sequence[StoredShot], *, beside: str | None = None
    ) -> Stamp:
        keys = Keys(tenant)
        args: list[str | bytes | float] = [since.epoch, "any" if beside is None else beside]
        for shot in shots:
            args += [shot.id, owner_of(shot), shot.feature, shot.image or b""]
        pile = keys.shots((await self._places(tenant, since.epoch)).pile)
        told = await self._run("shots.lua", (keys.config, keys.log, *pile), args)
        if told[0] < 0:
            raise ReloadNeeded(tenant)
        return parse_stamp(since.epoch, *told)

    async def images(self, tenant: str, at: Stamp, shots: Sequence[StoredShot]) -> Sequence[bytes | None]:
        key = Keys(tenant).shots((await self._places(tenant, at.epoch)).pile)[2]
        found: list[bytes | None] = []
        for part in slices_by_size(shots, lambda shot: shot.kept):
            found += await self._do(self._client.hmget(key, [shot.id for shot in part]))
        return found

    async def remove_shots(self, tenant: str, ids: Sequence[str]) -> int:
        removed = await self._remove(tenant, ("ids", *ids))
        return 0 if removed is None else removed[1]

    async def reset(self, tenant: str, *, dynamic: bool, static: bool, class_ids: Sequence[str] | None) -> Stamp | None:
        which: tuple[str, ...] = ("none",)
        if static:
            which = ("all",) if class_ids is None else ("classes", *class_ids)
        removed = await self._remove(tenant, which, slots_of=class_ids, slots=dynamic)
        return None if removed is None else removed[0]

    async def purge(self, tenant: str, class_id: str, slot: str) -> bool:
        keys = Keys(tenant)
        for _ in range(_TRIES):
            fields = await self._do(self._client.hgetall(keys.config))
            if not fields:
                return False
            epoch, bank = parse_record(fields).stamp.epoch, Locations.of(fields).bank
            told = await self._run("purge.lua", (keys.config, keys.log, *keys.slots(bank, class_id)), (epoch, slot))
            if told >= 0:
                return bool(told)
        raise Contended

    async def digests(self, tenant: str, at: Stamp, class_ids: Sequence[str]) -> Mapping[str, str]:
        keys, bank = Keys(tenant), (await self._places(tenant, at.epoch)).bank
        entropies = [keys.slots(bank, class_id)[0] for class_id in class_ids]
        told = await self._run("digests.lua", (keys.config, *entropies), (at.epoch, at.version))
        if len(told) < len(class_ids):
            raise ReloadNeeded(tenant)
        return {class_id: digest.decode() for class_id, digest in zip(class_ids, told, strict=True)}

    async def keep_snapshot(self, tenant: str, info: SnapshotInfo, parts: Iterable[bytes]) -> bool:
        keys, written = Keys(tenant), 0
        key = keys.snapshot(info.id)
        for part in parts:
            await self._do(self._client.hset(key, str(written), part))
            # One whose writer dies goes by itself.
            await self._do(self._client.expire(key, UNFINISHED_S))
            written += 1
        head = json.dumps({"format": FORMAT, **asdict(info)})
        return bool(await self._run("keep.lua", (keys.config, keys.snapshots, key), (info.id, head, written)))

    async def snapshots(self, tenant: str) -> Sequence[SnapshotInfo]:
        heads = await self._do(self._client.hvals(Keys(tenant).snapshots))
        return sorted((parse_snapshot_info(head) for head in heads), key=lambda info: (info.created, info.id))

    async def read_snapshot(self, tenant: str, id_: str, part: int) -> bytes | None:
        found: bytes | None = await self._do(self._client.hget(Keys(tenant).snapshot(id_), str(part)))
        return found

    async def drop_snapshot(self, tenant: str, id_: str) -> bool:
        keys = Keys(tenant)
        there = await self._do(self._client.hdel(keys.snapshots, id_))
        await self._do(self._client.unlink(keys.snapshot(id_)))
        return bool(there)

    async def note_job(self, tenant: str, job: Job) -> bool:
        keys = Keys(tenant)
        told = await self._run(
            "job.lua", (keys.config, keys.jobs), (job.id, json.dumps({"format": FORMAT, **asdict(job)}))
        )
        if told > JOBS:
            over = [known.id for known in await self.jobs(tenant) if known.over][: told - JOBS]
            if over:
                await self._do(self._client.hdel(keys.jobs, *over))
        return bool(told)

    async def jobs(self, tenant: str) -> Sequence[Job]:
        found = await self._do(self._client.hvals(Keys(tenant).jobs))
        return sorted((parse_job(text) for text in found), key=lambda job: (job.created, job.id))

    async def claim(self, tenant: str, what: str, seconds: float) -> bool:
        lasts = max(1, round(1000 * seconds))
        return bool(await self._do(self._client.set(Keys(tenant).claim(what), 1, nx=True, px=lasts)))

    async def recall(self, tenant: str, key: str) -> Remembered | None:
        bodies, heads, ends, _ = Keys(tenant).answers
        end = await self._do(self._client.zscore(ends, key))
        head = await self._do(self._client.hget(heads, key))
        body = await self._do(self._client.hget(bodies, key))
        if end is None or head is None or body is None or end <= self._clock():
            return None
        digest, status, media_type = json.loads(head)
        return Remembered(digest=digest, status=status, media_type=media_type, body=body)

    async def remember(self, tenant: str, key: str, answer: Remembered) -> None:
        now = self._clock()
        head = json.dumps([answer.digest, answer.status, answer.media_type])
        args = (repr(now), repr(now + self._remember_s), self._remember_bytes, key, head, answer.body)
        await self._run("remember.lua", Keys(tenant).answers, args)

    async def keep_key(self, key: StoredKey) -> bool:
        own, told = Keys(key.tenant).api_keys, json.dumps({"format": FORMAT, **asdict(key)})
        if not await self._do(self._client.hsetnx(own, key.id, told)):
            return bool(await self._do(self._client.hget(own, key.id)) == told.encode())
        # Afterwards: of a key that is not listed nobody was told yet.
        await self._do(self._client.zadd(KEYED, {key.tenant: 0}))
        return True

    async def find_keys(self, ids: Sequence[str]) -> Sequence[StoredKey | StoreDown | None]:
        pipeline = self._client.pipeline(transaction=False)
        for id_ in ids:
            pipeline.hget(Keys(tenant_of_key(id_)).api_keys, id_)
        found = await self._do(pipeline.execute(raise_on_error=not self._spread))
        return [self._fault(one) if isinstance(one, Exception) else parse_key_or_fault(one) for one in found]

    async def keys(self, tenant: str | None = None) -> Sequence[StoredKey]:
        tenants = [tenant] if tenant is not None else await self._keyed()
        found: list[StoredKey] = []
        for part in slices(tenants, SWEEP_KEYS):
            pipeline = self._client.pipeline(transaction=False)
            for own in part:
                pipeline.hvals(Keys(own).api_keys)
            for texts in await self._do(pipeline.execute()):
                found += map(parse_key, texts)
        return sorted(found, key=lambda key: key.id)

    async def drop_key(self, id_: str) -> bool:
        tenant = tenant_of_key(id_)
        there = await self._do(self._client.hdel(Keys(tenant).api_keys, id_))
        await self._unlist(tenant)
        return bool(there)

    async def admit(
        self, tenant: str, quota: Quota, images: int, lease: Lease, *, lasts_s: float, over: Sequence[Lease] = ()
    ) -> Allowance:
        return await self._limits.admit(Keys(tenant), quota, images, lease, lasts_s=lasts_s, over=over)

    async def renew(self, tenant: str, leases: Sequence[Lease], *, lasts_s: float) -> None:
        await self._limits.renew(Keys(tenant), leases, lasts_s=lasts_s)

    async def release(self, tenant: str, leases: Sequence[Lease]) -> None:
        await self._limits.release(Keys(tenant), leases)

    async def ping(self) -> None:
        await self._do(self._client.ping())

    async def check(self) -> None:
        """Return if the server is fit to keep memories, and those that it keeps are of our format.

        Raises:
            StoreDown: it is not; says why.
            FingerprintMismatch: they are not.
        """
        await check(self._client)
        check_major(await self._do(self._client.get(MAJOR)))

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _load(self, tenant: str, record: TenantRecord, places: Locations, *, images: bool) -> StoredMemory:
        keys, epoch = Keys(tenant), record.stamp.epoch
        # What an epoch's number stood for before a replica took over may not be what it stands for now.
        self._known[(record.name, epoch)] = places
        slots: dict[str, StoredBank] = {}
        barred: set[tuple[str, str]] = set()
        parts = slices([spec.id for spec in record.config.classes], classes_per_slice(record))

        async def read() -> None:
            for part in parts:
                touched = (keys.config, *keys.every_slot(places.bank, part))
                reply = await self._run("banks.lua", touched, (epoch,))
                if not reply[0]:
                    raise ReloadNeeded(tenant)
                for class_id, at in zip(part, range(1, len(reply), 3), strict=True):
                    slots[class_id] = parse_bank(*reply[at : at + 2])
                    barred.update((class_id, id_) for id_ in reply[at + 2].decode().split())

        # A few take slices in turn: the server gathers one while another is on its way and a third is taken apart here.
        await asyncio.gather(*(read() for _ in range(SLICES_AHEAD)))
        shots = await self._shots(keys.shots(places.pile), images=images)
        offsets = await self._offsets(keys.offsets(places.frame), record)
        counts, _ = await self._counters.read(keys, places.life, {})
        # Slices are read one after the other: what changed meanwhile is in the log, and changing it again is harmless.
        synced = await self.sync(tenant, record.stamp)
        return StoredMemory(
            record=replace(record, stamp=synced.stamp),
            slots=changed_banks(slots, synced.changes),
            shots=shots,
            barred=frozenset(barred),
            offsets=offsets,
            counts=counts,
        )

    async def _offsets(self, frame: str, record: TenantRecord) -> StoredOffsets:
        if record.training is None:
            return StoredOffsets()
        rows: dict[str, bytes] = {}
        ids = [spec.id for spec in record.config.classes]
        for part in slices(ids, max(1, SLICE_BYTES // (4 * OFFSETS * record.training.dim))):
            found = await self._do(self._client.hmget(frame, part))
            rows |= {own: row for own, row in zip(part, found, strict=True) if row is not None}
        return StoredOffsets(training=record.training, rows=rows)

    async def _shots(self, pile: tuple[str, str, str], *, images: bool) -> dict[str, tuple[StoredShot, ...]]:
        classes, features, pictures = pile
        owners = {id_: parse_owner(owner) for id_, owner in (await self._do(self._client.hgetall(classes))).items()}
        out: dict[str, list[StoredShot]] = {}
        for part in slices_by_size(sorted(owners), lambda id_: FEATURE_BYTES + images * owners[id_][1]):
            found = await self._do(self._client.hmget(features, part))
            kept = await self._do(self._client.hmget(pictures, part)) if images else [None] * len(part)
            for id_, feature, image in zip(part, found, kept, strict=True):
                # One that was removed since the ids were read has neither; the sync after it notices the new epoch.
                class_id, size = owners[id_]
                shot = StoredShot(
                    id=id_.decode(), class_id=class_id, feature=feature or b"", image=image, kept=0 if image else size
                )
                out.setdefault(class_id, []).append(shot)
        return {own: tuple(held) for own, held in out.items()}

    async def _write_bank(
        self,
        keys: Keys,
        number: int,
        slots: Mapping[str, StoredBank],
        barred: Iterable[tuple[str, str]],
        classes: Collection[str],
    ) -> None:
        """Write the slots and the barred ids of some classes."""
        await self._note_bank(keys, number, classes)
        commands: list[tuple[str | bytes | float, ...]] = []
        waiting = 0
        for class_id in classes:
            z, h = keys.slots(number, class_id)
            for part in slices_by_size(list(slots.get(class_id, ())), lambda slot: len(slot.feature)):
                commands.append(("ZADD", z, *(value for slot in part for value in (repr(slot.entropy), slot.id))))
                commands.append(("HSET", h, *(value for slot in part for value in (slot.id, slot.feature))))
                waiting += sum(len(slot.feature) for slot in part)
                if waiting >= SLICE_BYTES:
                    await self._together(commands)
                    commands, waiting = [], 0
        held = {own: set(bank.ids) for own, bank in slots.items()}
        free = ((own, id_) for own, id_ in barred if own in classes and id_ not in held.get(own, ()))
        commands += [("HSET", keys.slots(number, own)[1], id_, b"") for own, id_ in free]
        await self._together(commands)

    async def _write_pile(self, keys: Keys, number: int, shots: Sequence[StoredShot]) -> None:
        await self._do(self._client.hset(keys.written, f"s{number}", ""))
        classes, features, images = keys.shots(number)
        for part in slices_by_size(shots, lambda shot: shot.nbytes + FEATURE_BYTES):
            commands: list[tuple[str | bytes | float, ...]] = []
            for shot in part:
                commands += [("HSET", classes, shot.id, owner_of(shot)), ("HSET", features, shot.id, shot.feature)]
                if shot.image:
                    commands.append(("HSET", images, shot.id, shot.image))
            await self._together(commands)

    async def _write_frame(self, keys: Keys, number: int, rows: Mapping[str, bytes]) -> None:
        await self._do(self._client.sadd(keys.frames, number))
        for part in slices_by_size(list(rows.items()), lambda row: len(row[1])):
            await self._do(self._client.hset(keys.offsets(number), mapping=dict(part)))

    async def _note_bank(self, keys: Keys, number: int, classes: Collection[str]) -> None:
        await self._do(self._client.hset(keys.written, f"b{number}", " ".join(classes)))

    async def _together(self, commands: Sequence[tuple[str | bytes | float, ...]]) -> None:
        """Send commands at once; each is one step for the server, which takes others in between."""
        if not commands:
            return
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        await self._do(pipeline.execute())

    async def _sweep(self, keys: Keys, before: int, read: Locations | None = None) -> None:
        """Remove banks, piles and frames that were written before an epoch, but for those that are read."""
        kept = () if read is None else (f"b{read.bank}", f"s{read.pile}")
        for name in [name.decode() for name in await self._do(self._client.hkeys(keys.written))]:
            if int(name[1:]) < before and name not in kept:
                await self._remove_written(keys, name)
        for number in map(int, await self._do(self._client.smembers(keys.frames))):
            if number < before and (read is None or number != read.frame):
                await self._remove_frame(keys, number)
        await self._counters.sweep(keys, before, None if read is None else read.life)

    async def _remove_frame(self, keys: Keys, number: int) -> None:
        await self._do(self._client.unlink(keys.offsets(number)))
        await self._do(self._client.srem(keys.frames, number))

    async def _remove_written(self, keys: Keys, name: str, classes: Collection[str] = ()) -> None:
        """Remove a bank or a pile that nothing reads from any more, a slice at a time."""
        noted = (await self._do(self._client.hget(keys.written, name)) or b"").decode().split()
        number = int(name[1:])
        gone = keys.every_slot(number, {*noted, *classes}) if name.startswith("b") else keys.shots(number)
        for part in slices(gone, SWEEP_KEYS):
            await self._do(self._client.unlink(*part))
        await self._do(self._client.hdel(keys.written, name))

    async def _remove(
        self, tenant: str, which: tuple[str, ...], *, slots_of: Sequence[str] | None = (), slots: bool = False
    ) -> tuple[Stamp, int] | None:
        keys = Keys(tenant)
        for _ in range(_TRIES):
            fields = await self._do(self._client.hgetall(keys.config))
            if not fields:
                return None
            record, places = parse_record(fields), Locations.of(fields)
            named = [spec.id for spec in record.config.classes] if slots_of is None else slots_of
            gone = keys.every_slot(places.bank, named) if slots else []
            static = (*keys.shots(places.pile), keys.offsets(places.frame))
            names = await self._counters.names(keys, places.life)
            counted = (keys.counters(places.life), *(keys.counter(places.life, name) for name in names))
            forget = "none" if not slots else "all" if slots_of is None else " ".join(slots_of) or "none"
            touched = (keys.config, keys.log, keys.epochs, *static, *counted, *gone)
            told = await self._run("remove.lua", touched, (record.stamp.epoch, forget, len(names), *which))
            if told[0] >= 0:
                if forget == "all":
                    await self._counters.sweep(keys, told[0], told[0])
                return parse_stamp(told[0], told[1], told[3]), told[2]
        raise Contended

    async def _list(self, tenant: str) -> None:
        if not is_shadow(tenant):
            await self._do(self._client.zadd(TENANTS, {tenant: 0}))

    async def _keyed(self) -> list[str]:
        return [name.decode() for name in await self._do(self._client.zrange(KEYED, 0, -1))]

    async def _unlist(self, tenant: str) -> None:
        """Take a tenant that has no API keys out of the list of those that have."""
        own = Keys(tenant).api_keys
        if not await self._do(self._client.exists(own)):
            await self._do(self._client.zrem(KEYED, tenant))
            if await self._do(self._client.exists(own)):  # one was made in between
                await self._do(self._client.zadd(KEYED, {tenant: 0}))

    async def _places(self, tenant: str, epoch: int) -> Locations:
        """Return where an epoch's memory is read: it stays there, so it may be kept; scripts check the epoch."""
        known = self._known.get((tenant, epoch))
        if known is not None:
            return known
        fields = await self._do(self._client.hgetall(Keys(tenant).config))
        if int(fields.get(b"epoch", -1)) != epoch:
            raise ReloadNeeded(tenant)
        if len(self._known) > LOG_LENGTH:
            self._known.clear()
        self._known[(tenant, epoch)] = places = Locations.of(fields)
        return places

    async def _run(self, name: str, keys: Sequence[str], args: Sequence[str | bytes | float]) -> Reply:
        """Run a script by its hash; a server that forgot it is told it again."""
        script = self._scripts[name]
        digest = sha1(script.encode(), usedforsecurity=False).hexdigest()
        try:
            return await self._client.evalsha(digest, len(keys), *keys, *args)
        except NoScriptError:
            return await self._do(self._client.eval(script, len(keys), *keys, *args))
        except FAULTS as error:
            raise self._fault(error) from error

    async def _do(self, command: Any) -> Any:
        try:
            return await command
        except FAULTS as error:
            raise self._fault(error) from error

    def _fault(self, error: BaseException) -> StoreDown:
        """Return what an error means: that the store is away, if it did not answer and there is no other node."""
        said = down(error)
        if self._spread or not isinstance(error, RedisConnectionError | RedisTimeoutError | OSError):
            return said
        return StoreAway(said.detail, retry_after_s=said.retry_after_s)
