"""Redis values and the records they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.domain.memory import (
    Stamp,
    StoredBank,
    StoredShot,
    StoredSlot,
    TenantRecord,
    Training,
)
from service.domain.records import Job, JobState, SnapshotInfo, StoredKey
from service.domain.tenant import TenantConfig
from service.errors import FingerprintMismatch, StoreDown
from service.stores.protocol import Change

from .commands import SLICE_BYTES
from .formats import check_minor, fitting, known

FEATURE_BYTES = 1280


@dataclass(frozen=True, kw_only=True, slots=True)
class Locations:
    """Numbers of the bank, the pile, the frame (0: none) and the life that a tenant's memories are read from."""

    bank: int
    pile: int
    frame: int = 0
    life: int = 0

    @staticmethod
    def of(fields: Mapping[bytes, bytes]) -> Locations:
        known = {name: int(fields.get(name.encode(), 0)) for name in ("frame", "life")}
        return Locations(bank=int(fields[b"bank"]), pile=int(fields[b"pile"]), **known)


def parse_record(fields: Mapping[bytes, bytes]) -> TenantRecord:
    """Return the tenant record of a tenant's hash."""
    name = fields.get(b"name", b"").decode(errors="replace")
    check_minor(fields.get(b"format", b"(none)").decode(errors="replace"), name)
    return TenantRecord(
        name=name,
        config=TenantConfig.from_json(fields[b"config"]),
        fingerprint=fields[b"fingerprint"].decode(),
        origin=json.loads(fields[b"origin"]),
        labelling=fields[b"labelling"].decode(),
        created=float(fields[b"created"]),
        training=_training(fields),
        shown=fields.get(b"shown", b"").decode(),
        life=int(fields.get(b"life", 0)),
        stamp=parse_stamp(fields[b"epoch"], fields[b"version"], fields.get(b"mark")),
    )


def _training(fields: Mapping[bytes, bytes]) -> Training | None:
    text = fields.get(b"training")
    return None if text is None else Training(**fitting(json.loads(text), Training))


def stamp_or_none(epoch: bytes | None, version: bytes | None, mark: bytes | None) -> Stamp | None:
    """Return a stamp; None if the tenant is gone."""
    return None if epoch is None or version is None else parse_stamp(epoch, version, mark)


def parse_stamp(epoch: bytes | int, version: bytes | int, mark: bytes | None) -> Stamp:
    """Return the stamp of epoch, version and mark."""
    return Stamp(epoch=int(epoch), version=int(version), mark=(mark or b"").decode())


def parse_bank(held: bytes, features: Sequence[bytes]) -> StoredBank:
    """Return a class's slots from `id entropy` words and feature bytes."""
    words = held.decode().split()
    return StoredBank(ids=tuple(words[::2]), entropies=tuple(map(float, words[1::2])), features=b"".join(features))


def changed_banks(slots: Mapping[str, StoredBank], changes: Sequence[Change]) -> dict[str, StoredBank]:
    """Return banks after slot changes; those that nothing touched are the same objects."""
    touched: dict[str, dict[str, StoredSlot]] = {}
    for change in changes:
        held = slots.get(change.class_id, StoredBank())
        own = touched.setdefault(change.class_id, {slot.id: slot for slot in held})
        own.pop(change.evicted or "", None)
        own[change.slot.id] = change.slot
    return {**slots, **{class_id: StoredBank.of(own.values()) for class_id, own in touched.items()}}


def owner_of(shot: StoredShot) -> str:
    """Return what is stored of a shot's owner: class id and size of its kept image."""
    return f"{shot.class_id} {len(shot.image or b'')}"


def parse_owner(text: bytes) -> tuple[str, int]:
    """Return the class id and the size of the kept image that `owner_of` wrote."""
    class_id, size = text.decode().split(" ")
    return class_id, int(size)


def parse_snapshot_info(text: bytes) -> SnapshotInfo:
    """Return what is known of a snapshot."""
    values = known(text, SnapshotInfo, "A snapshot")
    return SnapshotInfo(**{**values, "stamp": Stamp(**values["stamp"])})


def parse_job(text: bytes) -> Job:
    """Return a job."""
    values = known(text, Job, "A job")
    return Job(**{**values, "state": JobState(values["state"])})


def parse_key(text: bytes) -> StoredKey:
    """Return an API key."""
    values = known(text, StoredKey, "An API key", strict=True)
    return StoredKey(**{**values, "scopes": tuple(values["scopes"])})


def parse_key_or_fault(text: bytes | None) -> StoredKey | StoreDown | None:
    """Return a key, or why it cannot be read: those that are looked for with it can."""
    try:
        return None if text is None else parse_key(text)
    except FingerprintMismatch as error:
        return StoreDown(error.detail)


def classes_per_slice(record: TenantRecord) -> int:
    """Return how many classes are read in one reply."""
    # How large features are is not known before the first is read.
    return max(1, SLICE_BYTES // (max(1, record.config.slots) * FEATURE_BYTES))


def parse_change(class_id: bytes, id_: bytes, entropy: bytes, feature: bytes, evicted: bytes) -> Change:
    """Return a slot change of the log."""
    slot = StoredSlot(id=id_.decode(), entropy=float(entropy), feature=feature)
    return Change(class_id=class_id.decode(), slot=slot, evicted=text_or_none(evicted))


def text_or_none(value: bytes) -> str | None:
    """Return a text; None if it is empty."""
    return value.decode() or None
