"""The store in Redis or Valkey: one node, Sentinel or a cluster. The only file that imports redis.

What has to be one step is a script in `lua/`. A bank, the dynamic slots of a tenant, is written aside in slices and
then switched to, so that no call keeps the server from others for long; banks that were left are swept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import NoScriptError, RedisError

from core.dynamic import Outcome

from ..errors import FingerprintMismatch, StoreDown
from ..tenants import TenantConfig
from .base import (
    Change,
    Conflict,
    PushCandidate,
    Pushed,
    ReloadNeeded,
    Remembered,
    Stamp,
    StoredMemory,
    StoredShot,
    StoredSlot,
    Synced,
    TenantRecord,
    Verdict,
)
from .keys import TENANTS, Keys

T = TypeVar("T")
Reply = Any
"""What redis-py gives for a script: nested lists of bytes and integers."""

FORMAT = 1
"""Format of what is stored. A store of another one is refused, and nothing in it is overwritten."""

LOG_LENGTH = 2048
"""Slot changes kept for workers that are behind; one further behind loads anew."""

OLDEST = (6, 2)
"""Version that the scripts need."""

SLICE_BYTES = 1 << 20
"""Read or written in one command, so that the server never stalls."""

_SWEEP_KEYS = 256
_RETRY_S = 1.0
_TRIES = 16


class RedisStore:
    """A `MemoryStore` in Redis 6.2 or Valkey, or newer. `clock` is wall time in seconds, the same for all workers."""

    def __init__(
        self,
        client: Redis | RedisCluster,
        *,
        clock: Callable[[], float],
        remember_s: float,
        remember_bytes: int,
    ) -> None:
        self._client: Any = client
        self._clock, self._remember_s, self._remember_bytes = clock, remember_s, remember_bytes
        self._scripts = {file.name: file.read_text() for file in files(__package__).joinpath("lua").iterdir()}
        self._banks: dict[tuple[str, int], int] = {}

    async def get(self, tenant: str) -> TenantRecord | None:
        fields = await self._do(self._client.hgetall(Keys(tenant).config))
        return _record(fields) if fields else None

    async def names(self, *, after: str, limit: int) -> Sequence[str]:
        first = f"({after}" if after else "-"
        found = await self._do(self._client.zrangebylex(TENANTS, first, "+", start=0, num=limit))
        return [name.decode() for name in found]

    async def load(self, tenant: str) -> StoredMemory | None:
        for _ in range(_TRIES):
            fields = await self._do(self._client.hgetall(Keys(tenant).config))
            if not fields:
                return None
            try:
                return await self._load(tenant, fields)
            except ReloadNeeded:
                continue  # the tenant began a new life while its slices were read
        raise _restless()

    async def replace(
        self,
        tenant: str,
        config: TenantConfig,
        fingerprint: str,
        *,
        expected: Stamp | None,
        slots: Mapping[str, Iterable[StoredSlot]],
    ) -> Stamp:
        keys = Keys(tenant)
        known = await self._do(self._client.hgetall(keys.config))
        old = _record(known) if known else None
        if (old.stamp if old else None) != expected:
            raise Conflict(tenant)
        # Before the tenant is there: a name without a tenant harms nobody, a tenant without a name would be lost.
        await self._do(self._client.zadd(TENANTS, {tenant: 0}))
        epoch = bank = int(await self._do(self._client.incr(keys.epochs)))
        await self._write_bank(keys, bank, {own: tuple(part) for own, part in slots.items()})
        stay = {spec.id for spec in config.classes}
        leaves = [spec.id for spec in old.config.classes if spec.id not in stay] if old else []
        at = ("", "") if expected is None else (expected.epoch, expected.version)
        about = (FORMAT, tenant, config.to_json(), fingerprint, config.slots)
        version = await self._run(
            "replace.lua", (keys.config, keys.log, keys.tombstones, *keys.shots), (*at, epoch, bank, *about, *leaves)
        )
        if version < 0:
            await self._sweep(keys, [bank])
            raise Conflict(tenant)
        await self._sweep_before(keys, bank)
        return Stamp(epoch=epoch, version=version)

    async def delete(self, tenant: str) -> bool:
        keys = Keys(tenant)
        gone = await self._run("delete.lua", (keys.config, keys.log, keys.tombstones, *keys.shots, *keys.answers), ())
        await self._do(self._client.zrem(TENANTS, tenant))
        await self._sweep_before(keys, int(await self._do(self._client.get(keys.epochs)) or 0) + 1)
        return bool(gone)

    async def sync(self, tenant: str, since: Stamp) -> Synced:
        return (await self.push(tenant, since, ())).synced

    async def push(self, tenant: str, since: Stamp, candidates: Sequence[PushCandidate]) -> Pushed:
        keys, bank = Keys(tenant), await self._bank(tenant, since.epoch)
        named = list(dict.fromkeys(candidate.class_id for candidate in candidates))
        number = {class_id: at for at, class_id in enumerate(named, 1)}
        args: list[str | bytes | float] = [since.epoch, since.version, LOG_LENGTH, len(named), *named]
        for candidate in candidates:
            slot = candidate.slot
            args += [number[candidate.class_id], slot.id, repr(slot.entropy), slot.feature]
        touched = (keys.config, keys.log, keys.tombstones, keys.classes(bank), *keys.every_slot(bank, named))
        reply = await self._run("push.lua", touched, args)
        if not reply[0]:
            raise ReloadNeeded(tenant)
        verdicts = tuple(Verdict(outcome=Outcome(told.decode()), evicted=_text(evicted)) for told, evicted in reply[2])
        changes = tuple(_change(*values) for values in reply[3])
        stamp = Stamp(epoch=since.epoch, version=int(reply[1]))
        return Pushed(verdicts=verdicts, synced=Synced(stamp=stamp, changes=changes))

    async def add_shots(self, tenant: str, since: Stamp, shots: Sequence[StoredShot]) -> Stamp:
        keys = Keys(tenant)
        args: list[str | bytes | float] = [since.epoch]
        for shot in shots:
            args += [shot.id, shot.class_id, shot.feature, shot.image or b""]
        version = await self._run("shots.lua", (keys.config, keys.log, *keys.shots), args)
        if version < 0:
            raise ReloadNeeded(tenant)
        return Stamp(epoch=since.epoch, version=version)

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
            record, bank = _record(fields), int(fields[b"bank"])
            touched = (keys.config, keys.log, keys.tombstones, *keys.slots(bank, class_id))
            told = await self._run("purge.lua", touched, (record.stamp.epoch, class_id, slot))
            if told >= 0:
                return bool(told)
        raise _restless()

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

    async def ping(self) -> None:
        await self._do(self._client.ping())

    async def check(self) -> None:
        """Return if the server is fit to keep memories.

        Raises:
            StoreDown: it does not answer, is too old, or may drop what it holds; says which.
        """
        about = await self._do(self._client.info("server"))
        about = about if "redis_version" in about else next(iter(about.values()))
        version = str(about["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            raise StoreDown(f"The store is version {version}; {OLDEST[0]}.{OLDEST[1]} or newer is needed.")
        memory = await self._do(self._client.info("memory"))
        memory = memory if "maxmemory_policy" in memory else next(iter(memory.values()))
        if memory["maxmemory_policy"] != "noeviction":
            raise StoreDown(
                f"The store's maxmemory-policy is {memory['maxmemory_policy']}: it would drop memories without a word. "
                "Set it to noeviction."
            )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _load(self, tenant: str, fields: Mapping[bytes, bytes]) -> StoredMemory:
        keys, record = Keys(tenant), _record(fields)
        bank, epoch = int(fields[b"bank"]), record.stamp.epoch
        slots: dict[str, dict[str, StoredSlot]] = {}
        for part in _parts([spec.id for spec in record.config.classes], self._classes_a_slice(record)):
            reply = await self._run("banks.lua", (keys.config, *keys.every_slot(bank, part)), (epoch,))
            if not reply[0]:
                raise ReloadNeeded(tenant)
            for class_id, entropies, features in zip(part, reply[1::2], reply[2::2], strict=True):
                slots[class_id] = _slots(entropies, features)
        shots = await self._shots(keys)
        barred = [entry.decode().split("/", 1) for entry in await self._do(self._client.smembers(keys.tombstones))]
        # Slices are read one after the other: what changed meanwhile is in the log, and changing it again is harmless.
        synced = await self.sync(tenant, record.stamp)
        for change in synced.changes:
            own = slots.setdefault(change.class_id, {})
            own.pop(change.evicted or "", None)
            own[change.slot.id] = change.slot
        config = TenantRecord(
            name=record.name, config=record.config, fingerprint=record.fingerprint, stamp=synced.stamp
        )
        return StoredMemory(
            record=config,
            slots={own: tuple(held.values()) for own, held in slots.items()},
            shots=shots,
            barred=frozenset((own, id_) for own, id_ in barred),
        )

    async def _shots(self, keys: Keys) -> dict[str, tuple[StoredShot, ...]]:
        classes, features, images = keys.shots
        owners = await self._do(self._client.hgetall(classes))
        out: dict[str, list[StoredShot]] = {}
        for part in _parts(list(owners), _SWEEP_KEYS):
            found = await self._do(self._client.hmget(features, part))
            kept = await self._do(self._client.hmget(images, part))
            for id_, feature, image in zip(part, found, kept, strict=True):
                if feature is None:
                    continue  # removed since the ids were read; the epoch that it began is noticed by the sync
                shot = StoredShot(id=id_.decode(), class_id=owners[id_].decode(), feature=feature, image=image)
                out.setdefault(shot.class_id, []).append(shot)
        return {own: tuple(held) for own, held in out.items()}

    def _classes_a_slice(self, record: TenantRecord) -> int:
        # A feature of 1280 entries has 2.5 KB; how large ours are is not known before the first is read.
        return max(1, SLICE_BYTES // (max(1, record.config.slots) * 2600))

    async def _write_bank(self, keys: Keys, bank: int, slots: Mapping[str, Sequence[StoredSlot]]) -> None:
        await self._do(self._client.sadd(keys.banks, bank))
        for class_id, own in slots.items():
            z, h = keys.slots(bank, class_id)
            for part in _parts(own, max(1, SLICE_BYTES // max(1, len(own[0].feature) if own else 1))):
                await self._do(self._client.zadd(z, {slot.id: slot.entropy for slot in part}))
                await self._do(self._client.hset(h, mapping={slot.id: slot.feature for slot in part}))
            if own:
                await self._do(self._client.sadd(keys.classes(bank), class_id))

    async def _sweep_before(self, keys: Keys, bank: int) -> None:
        banks = await self._do(self._client.smembers(keys.banks))
        await self._sweep(keys, sorted(int(old) for old in banks if int(old) < bank))

    async def _sweep(self, keys: Keys, banks: Iterable[int]) -> None:
        """Remove banks that nothing reads from any more, a slice at a time."""
        for bank in banks:
            classes = [own.decode() for own in await self._do(self._client.smembers(keys.classes(bank)))]
            for part in _parts(keys.every_slot(bank, classes), _SWEEP_KEYS):
                await self._do(self._client.unlink(*part))
            await self._do(self._client.unlink(keys.classes(bank)))
            await self._do(self._client.srem(keys.banks, bank))

    async def _remove(
        self, tenant: str, which: tuple[str, ...], *, slots_of: Sequence[str] | None = (), slots: bool = False
    ) -> tuple[Stamp, int] | None:
        keys = Keys(tenant)
        for _ in range(_TRIES):
            fields = await self._do(self._client.hgetall(keys.config))
            if not fields:
                return None
            record, bank = _record(fields), int(fields[b"bank"])
            named = [spec.id for spec in record.config.classes] if slots_of is None else slots_of
            gone = keys.every_slot(bank, named) if slots else []
            touched = (keys.config, keys.log, keys.tombstones, keys.epochs, *keys.shots, *gone)
            told = await self._run("remove.lua", touched, (record.stamp.epoch, *which))
            if told[0] >= 0:
                return Stamp(epoch=told[0], version=told[1]), told[2]
        raise _restless()

    async def _bank(self, tenant: str, epoch: int) -> int:
        """Return the bank of an epoch: an epoch has one, so it may be kept; scripts check that the epoch still is."""
        known = self._banks.get((tenant, epoch))
        if known is not None:
            return known
        now, bank = await self._do(self._client.hmget(Keys(tenant).config, "epoch", "bank"))
        if now is None or int(now) != epoch:
            raise ReloadNeeded(tenant)
        if len(self._banks) > LOG_LENGTH:
            self._banks.clear()
        self._banks[(tenant, epoch)] = int(bank)
        return int(bank)

    async def _run(self, name: str, keys: Sequence[str], args: Sequence[str | bytes | float]) -> Reply:
        """Run a script by its hash; a server that forgot it is told it again."""
        script = self._scripts[name]
        digest = sha1(script.encode(), usedforsecurity=False).hexdigest()
        try:
            return await self._client.evalsha(digest, len(keys), *keys, *args)
        except NoScriptError:
            return await self._do(self._client.eval(script, len(keys), *keys, *args))
        except (RedisError, OSError) as error:
            raise _down(error) from error

    async def _do(self, command: Any) -> Any:
        try:
            return await command
        except (RedisError, OSError) as error:
            raise _down(error) from error


def connect(url: str, **options: Any) -> Redis | RedisCluster:
    """Return a client for a `redis://`, `rediss://`, `unix://`, `redis+sentinel://` or `redis(s)+cluster://` URL.

    Raises:
        ValueError: the URL is none of these.
    """
    parts = urlsplit(url)
    if parts.scheme in ("redis", "rediss", "unix"):
        return Redis.from_url(url, **options)
    if parts.scheme in ("redis+cluster", "rediss+cluster"):
        plain = urlunsplit(parts._replace(scheme=parts.scheme.removesuffix("+cluster")))
        return RedisCluster.from_url(plain, **options)
    if parts.scheme == "redis+sentinel":
        return _sentinel(url, options)
    raise ValueError(f"The store URL begins with {parts.scheme!r}; expected redis, rediss, unix, sentinel or cluster.")


def _sentinel(url: str, options: Mapping[str, Any]) -> Redis:
    parts = urlsplit(url)
    hosts = parts.netloc.rpartition("@")[2].split(",")
    watchers = [(host.rpartition(":")[0] or host, int(host.rpartition(":")[2] or 26379)) for host in hosts]
    sentinel = Sentinel(watchers, **options)  # type: ignore[no-untyped-call]
    service = parts.path.strip("/") or "mymaster"
    return cast("Redis", sentinel.master_for(service, username=parts.username, password=parts.password))


def _record(fields: Mapping[bytes, bytes]) -> TenantRecord:
    if int(fields[b"format"]) != FORMAT:
        raise FingerprintMismatch(
            f"The tenant {fields[b'name'].decode()!r} is stored in format {int(fields[b'format'])}; this version reads "
            f"{FORMAT}. Serve it with the version that wrote it."
        )
    return TenantRecord(
        name=fields[b"name"].decode(),
        config=TenantConfig.from_json(fields[b"config"]),
        fingerprint=fields[b"fingerprint"].decode(),
        stamp=Stamp(epoch=int(fields[b"epoch"]), version=int(fields[b"version"])),
    )


def _slots(entropies: Sequence[bytes], features: Sequence[bytes]) -> dict[str, StoredSlot]:
    held = dict(zip(features[::2], features[1::2], strict=True))
    return {
        id_.decode(): StoredSlot(id=id_.decode(), entropy=float(entropy), feature=held[id_])
        for id_, entropy in zip(entropies[::2], entropies[1::2], strict=True)
    }


def _change(class_id: bytes, id_: bytes, entropy: bytes, feature: bytes, evicted: bytes) -> Change:
    slot = StoredSlot(id=id_.decode(), entropy=float(entropy), feature=feature)
    return Change(class_id=class_id.decode(), slot=slot, evicted=_text(evicted))


def _text(value: bytes) -> str | None:
    return value.decode() or None


def _down(error: Exception) -> StoreDown:
    return StoreDown(f"The store does not do what it is asked: {type(error).__name__}.", retry_after_s=_RETRY_S)


def _restless() -> StoreDown:
    return StoreDown("The tenant keeps changing under the call.", retry_after_s=_RETRY_S)


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
