"""Any memory comes back from its file bit for bit; any bytes are a memory or are refused, and nothing else happens."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from service.domain.memory import Stamp, StoredBank, StoredMemory, StoredShot, StoredSlot, TenantRecord
from service.domain.tenant import ClassSpec, TenantConfig
from service.errors import InvalidRequest, LimitExceeded
from service.serialization import reader, writer
from service.settings import Settings
from tests.support.laws import examples

CREATED = "2026-01-02T03:04:05Z"
LIMITS = Settings(max_slots=6)
IDS = st.text("ABYZabyz0189._-", min_size=1, max_size=8) | st.just("x" * 64)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "M", "Z"]), min_size=1, max_size=4)

laws = examples(40)


def features(seed: int, count: int, dim: int) -> list[bytes]:
    """Return so many features of unit norm, as near as half precision comes to it."""
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    halves = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("<f2")
    return [row.tobytes() for row in halves]


@st.composite
def memories(draw: st.DrawFn) -> StoredMemory:
    """Draw a memory that a store could hold."""
    names = [name for name in draw(st.lists(NAMES, min_size=1, max_size=4)) if "".join(name.split()) == name]
    specs = tuple(ClassSpec(name=name) for name in dict.fromkeys(_nfc(names)))
    config = TenantConfig(classes=specs, slots=draw(st.integers(0, 6)), beta=draw(st.floats(0, 1e300)))
    dim, most = draw(st.integers(1, 70)), math.log(max(1, len(specs)))
    nats = st.floats(-1e-6, most) | st.sampled_from((0.0, -0.0, most))
    slots, shots, barred = {}, {}, set()
    ids = draw(st.lists(IDS, min_size=3, max_size=9, unique=True))
    for spec in specs:
        known = draw(st.lists(IDS, min_size=2, max_size=9, unique=True))
        own = _slots(draw, known[: config.slots], nats, dim)
        if own:
            slots[spec.id] = StoredBank.of(own)
        barred |= {(spec.id, id_) for id_ in known[config.slots :]}
        mine, ids = ids[:3], ids[3:]
        if mine:
            shots[spec.id] = tuple(_shot(draw, spec.id, id_, dim) for id_ in sorted(mine))
    record = TenantRecord(
        name="zoo",
        config=config,
        fingerprint=draw(NAMES),
        stamp=Stamp(epoch=draw(st.integers(0, 10**15 - 1)), version=draw(st.integers(0, 10**15 - 1))),
        labelling=config.labelling,
        origin=draw(st.dictionaries(NAMES, NAMES, max_size=3)),
    )
    return StoredMemory(record=record, slots=slots, shots=shots, barred=frozenset(barred))


def _nfc(names: Sequence[str]) -> list[str]:
    return [unicodedata.normalize("NFC", name) for name in names]


def _slots(draw: st.DrawFn, ids: Sequence[str], nats: st.SearchStrategy[float], dim: int) -> list[StoredSlot]:
    rows = features(draw(st.integers(0, 99)), len(ids), dim)
    return [StoredSlot(id=id_, entropy=draw(nats), feature=row) for id_, row in zip(ids, rows, strict=True)]


def _shot(draw: st.DrawFn, class_id: str, id_: str, dim: int) -> StoredShot:
    (feature,) = features(draw(st.integers(0, 99)), 1, dim)
    image = draw(st.none() | st.binary(min_size=1, max_size=20))
    waits = image is not None and draw(st.booleans())
    return StoredShot(id=id_, class_id=class_id, feature=b"" if waits else feature, image=image)


def bits(stored: StoredMemory) -> Any:
    """Return what equality of floats does not see: the entropies bit for bit."""
    return {own: np.array(bank.entropies).tobytes() for own, bank in stored.slots.items()}


@given(stored=memories(), size=st.integers(1, 5000))
@laws
def test_what_was_written_is_read_back_bit_for_bit(
    stored: StoredMemory, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "memory"
    path.write_bytes(b"".join(writer.parts(stored, created=CREATED, size=size)))
    again = reader.read(path, settings=LIMITS)
    assert again == stored
    assert bits(again) == bits(stored)
    assert path.stat().st_size == writer.size_of(stored, created=CREATED)
    assert writer.dim_of(again) == writer.dim_of(stored)
    with safe_open(path, "numpy") as file:
        assert len(file.keys()) == 12


def is_memory_or_refused(data: bytes, path: Path) -> bool:
    """Return whether bytes are read as a memory; one that is comes back from its own file, and the library opens it."""
    path.write_bytes(data)
    try:
        found = reader.read(path, settings=LIMITS)
    except (InvalidRequest, LimitExceeded):
        return False
    with safe_open(path, "numpy") as file:
        file.keys()
    writer.write(found, path, created=CREATED)
    assert reader.read(path, settings=LIMITS) == found
    return True


@given(stored=memories(), data=st.data())
@laws
def test_a_file_with_some_bytes_changed_is_a_memory_or_refused(
    stored: StoredMemory, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    good = bytearray().join(writer.parts(stored, created=CREATED))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    is_memory_or_refused(bytes(good), tmp_path_factory.getbasetemp() / "memory")


@given(stored=memories(), data=st.data())
@laws
def test_a_file_that_is_cut_or_too_long_is_refused(
    stored: StoredMemory, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    good = b"".join(writer.parts(stored, created=CREATED))
    path = tmp_path_factory.getbasetemp() / "memory"
    assert not is_memory_or_refused(good[: data.draw(st.integers(0, len(good) - 1))], path)
    assert not is_memory_or_refused(good + data.draw(st.binary(min_size=1, max_size=9)), path)


def small() -> StoredMemory:
    """Return a memory whose file is small enough to try every byte of it."""
    config = TenantConfig(classes=(ClassSpec(name="a"), ClassSpec(name="b")), templates=("{}",), slots=2)
    one, two, three = config.classes[0].id, config.classes[1].id, features(0, 3, 2)
    return StoredMemory(
        record=TenantRecord(
            name="z", config=config, fingerprint="f", stamp=Stamp(epoch=1, version=2), labelling=config.labelling
        ),
        slots={one: StoredBank(ids=("x", "y"), entropies=(0.25, 0.5), features=three[0] + three[1])},
        shots={
            one: (StoredShot(id="s", class_id=one, feature=b"", image=b"12"),),
            two: (StoredShot(id="t", class_id=two, feature=three[2]),),
        },
        barred=frozenset({(two, "x")}),
    )


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_byte_of_a_file_may_be_wrong(mask: int, tmp_path: Path) -> None:
    good = b"".join(writer.parts(small(), created=CREATED))
    assert is_memory_or_refused(good, tmp_path / "memory")
    told = [
        is_memory_or_refused(good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :], tmp_path / "memory")
        for at in range(len(good))
    ]
    assert not all(told)


def test_a_file_may_end_anywhere(tmp_path: Path) -> None:
    good = b"".join(writer.parts(small(), created=CREATED))
    assert not any(is_memory_or_refused(good[:end], tmp_path / "memory") for end in range(len(good)))


@given(data=st.binary(max_size=200))
@laws
def test_any_bytes_are_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "memory"
    assert not is_memory_or_refused(data, path)
    assert not is_memory_or_refused(len(data).to_bytes(8, "little") + data, path)
