"""A memory becomes a file and comes back bit for bit; a file that is anything else is refused with a sentence."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from core.errors import IncompatibleMemory
from service.domain.memory import Stamp, StoredBank, StoredMemory, StoredShot, StoredSlot, TenantRecord
from service.domain.tenant import ClassSpec, TenantConfig, class_id
from service.errors import InvalidRequest, LimitExceeded
from service.serialization import checks, container, reader, writer
from service.settings import Settings

CREATED = "2026-01-02T03:04:05+00:00"
DIM = 4
LIMITS = Settings(max_classes=5, max_prompts=8, max_slots=8, max_shots=3, tenant_max_bytes=4096)
CAT, DOG, EEL = class_id("cat"), class_id("dog"), class_id("e\u00e9l")


def feature(seed: int, dim: int = DIM) -> bytes:
    """Return the bytes of a feature of unit norm."""
    row = np.random.default_rng(seed).normal(size=dim)
    return (row / np.linalg.norm(row)).astype("<f2").tobytes()


def slot(id_: str, entropy: float, seed: int = 0) -> StoredSlot:
    return StoredSlot(id=id_, entropy=entropy, feature=feature(seed))


def memory() -> StoredMemory:
    """Return a memory that has one of everything: an empty class, a pending shot, kept images, barred ids."""
    specs = ClassSpec(name="cat", prompts=('a "cat" \\ [{}',)), ClassSpec(name="dog"), ClassSpec(name="e\u00e9l")
    config = TenantConfig(classes=specs, slots=3, beta=0.1, weights=(1.0, 0.25, 1 / 3), retention="images")
    return StoredMemory(
        record=TenantRecord(
            name="zoo",
            config=config,
            fingerprint="fake-1",
            stamp=Stamp(epoch=7, version=1234),
            labelling=config.labelling,
            origin={"model": "f\u00e4ke", "dim": "4"},
        ),
        slots={
            CAT: StoredBank.of([slot("b", 1 / 3, 1), slot("a", 1 / 3, 2), slot("A.b_c-9", -0.0, 3)]),
            EEL: StoredBank.of([slot("a", 5e-324, 4), slot("f" * 64, math.log(3), 5)]),
        },
        shots={
            CAT: (
                StoredShot(id="s1", class_id=CAT, feature=feature(6), image=b"\0image\n"),
                StoredShot(id="s2", class_id=CAT, feature=b"", image=b"another"),
            ),
            DOG: (StoredShot(id="s0", class_id=DOG, feature=feature(7)),),
        },
        barred=frozenset({(CAT, "x"), (CAT, "y"), (DOG, "a")}),
    )


def bare(*names: str) -> StoredMemory:
    """Return a memory of some classes with nothing in it."""
    config = TenantConfig(classes=tuple(ClassSpec(name=name) for name in names), slots=3)
    record = replace(memory().record, config=config, labelling=config.labelling)
    return StoredMemory(record=record, slots={}, shots={})


def emptied(**kept: Any) -> StoredMemory:
    """Return the memory with nothing but what is given."""
    return replace(memory(), **{"slots": {}, "shots": {}, "barred": frozenset(), **kept})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.safetensors"


def read(path: Path, settings: Settings = LIMITS) -> StoredMemory:
    return reader.read(path, settings=settings)


# A memory and its file ------------------------------------------------------------------------------------------------

KINDS = {
    "of everything": memory(),
    "without classes": bare(),
    "of nothing but classes": bare("cat", "dog"),
    "of slots alone": emptied(slots=memory().slots),
    "of shots alone": emptied(shots=memory().shots),
    "of barred ids alone": emptied(barred=memory().barred),
    "of pending shots alone": emptied(shots={CAT: memory().shots[CAT][1:]}),
}


@pytest.mark.parametrize("stored", KINDS.values(), ids=KINDS)
def test_what_was_written_is_read_back_as_it_was(stored: StoredMemory, path: Path) -> None:
    writer.write(stored, path, created=CREATED)
    assert read(path) == stored


def test_minus_zero_stays_minus_zero(path: Path) -> None:
    writer.write(memory(), path, created=CREATED)
    assert math.copysign(1.0, read(path).slots[CAT].entropies[0]) == -1.0


def test_the_parts_make_the_file_and_all_but_the_last_are_of_one_size(path: Path) -> None:
    count = writer.write(memory(), path, created=CREATED)
    whole = path.read_bytes()
    assert len(whole) == count == writer.size_of(memory(), created=CREATED)
    for size in (1, 7, 512, count - 1, count, count + 1):
        found = list(writer.parts(memory(), created=CREATED, size=size))
        assert b"".join(found) == whole
        assert {len(part) for part in found[:-1]} <= {size}
        assert 0 < len(found[-1]) <= size


def test_the_same_memory_and_time_make_the_same_bytes_in_whatever_order_it_was_put_together() -> None:
    one, stored = memory(), memory()
    turned = replace(
        stored,
        record=replace(stored.record, origin=dict(reversed(stored.record.origin.items()))),
        slots=dict(reversed(stored.slots.items())),
        shots=dict(reversed(stored.shots.items())),
    )
    made = b"".join(writer.parts(one, created=CREATED))
    assert b"".join(writer.parts(turned, created=CREATED)) == made
    assert b"".join(writer.parts(one, created="2026-01-02")) != made


def test_the_library_opens_a_file_and_finds_the_columns(path: Path) -> None:
    writer.write(memory(), path, created=CREATED)
    with safe_open(path, "numpy") as file:
        said = file.metadata()
    found = load_file(path)
    assert (said["format"], said["version"], said["created"]) == ("dmn-memory", "1", CREATED)
    assert (said["fingerprint"], said["epoch"], said["memory_version"]) == ("fake-1", "7", "1234")
    assert TenantConfig.from_json(said["config"]) == memory().record.config
    assert found["dynamic.features"].shape == (5, DIM)
    assert found["static.features"].shape == (2, DIM)
    assert found["dynamic.classes"].tolist() == [0, 0, 0, 2, 2]
    assert found["dynamic.entropies"].tolist() == [-0.0, 1 / 3, 1 / 3, 5e-324, math.log(3)]
    assert found["static.has_feature"].tolist() == [1, 0, 1]
    assert found["static.image_sizes"].tolist() == [7, 7, 0]
    assert found["dynamic.ids"].tobytes().split(b"\n") == [b"A.b_c-9", b"a", b"b", b"a", b"f" * 64]


def test_every_column_begins_where_its_type_should(path: Path) -> None:
    writer.write(memory(), path, created=CREATED)
    header, start = head_of(path.read_bytes())
    sizes = {"F64": 8, "I64": 8, "I32": 4, "F16": 2, "U8": 1}
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    assert len(entries) == 12
    assert all((start + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0 for entry in entries)


def test_a_file_that_the_library_wrote_is_read_too(path: Path) -> None:
    writer.write(memory(), path, created=CREATED)
    with safe_open(path, "numpy") as file:
        said = file.metadata()
    again = path.with_name("again")
    save_file(load_file(path), again, metadata=said)
    assert read(again) == memory()


def test_the_feature_size_is_that_of_the_first_feature() -> None:
    assert [writer.dim_of(stored) for stored in KINDS.values()] == [DIM, None, None, DIM, DIM, None, None]


def test_slots_that_another_label_set_scored_may_be_more_than_there_will_be(path: Path) -> None:
    """A configuration that has fewer slots and other classes takes the best of them once they are scored anew."""
    config = replace(memory().record.config, slots=2)
    stored = replace(memory(), record=replace(memory().record, config=config, labelling="earlier"))
    writer.write(stored, path, created=CREATED)
    assert read(path) == stored
    with pytest.raises(InvalidRequest, match="'cat' has 3 slots in the file; at most 2"):
        read(path, LIMITS.model_copy(update={"max_slots": 2}))


def test_an_entropy_may_lie_outside_its_range_by_what_rounding_does(path: Path) -> None:
    given(path, {"dynamic.entropies": np.array([-1e-6, 0, 0, 0, math.log(3) + 9e-4])})
    assert read(path).slots[EEL].entropies == (0.0, math.log(3) + 9e-4)


def test_what_no_class_owns_and_empty_banks_are_left_out(path: Path) -> None:
    stored = memory()
    more = replace(stored, slots={**stored.slots, DOG: StoredBank()}, barred=stored.barred | {(class_id("gone"), "a")})
    writer.write(more, path, created=CREATED)
    assert read(path) == stored


def test_a_memory_that_was_loaded_without_its_images_is_not_written(path: Path) -> None:
    shots = {DOG: (StoredShot(id="s", class_id=DOG, feature=feature(1), kept=5),)}
    with pytest.raises(ValueError, match="without the images"):
        writer.write(emptied(shots=shots), path, created=CREATED)
    assert not path.exists()


def test_features_of_two_sizes_are_not_written(path: Path) -> None:
    shots = {DOG: (StoredShot(id="s", class_id=DOG, feature=feature(1, DIM + 1)),)}
    with pytest.raises(IncompatibleMemory, match="expected 4 entries"):
        writer.write(replace(memory(), shots=shots), path, created=CREATED)
    assert not path.exists()


def test_a_configuration_that_no_header_could_hold_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "HEADER_BYTES", 1000)
    with pytest.raises(LimitExceeded, match="Remove classes or sentences"):
        writer.write(memory(), path, created=CREATED)
    assert not path.exists()


def test_a_header_longer_than_the_library_takes_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer.write(memory(), path, created=CREATED)
    monkeypatch.setattr(container, "HEADER_BYTES", 1000)
    with pytest.raises(InvalidRequest, match="a header may have 1000"):
        read(path)


def test_a_configuration_of_a_release_that_lacked_a_field_has_its_default(path: Path) -> None:
    values = json.loads(memory().record.config.to_json())
    del values["retention"]
    given(path, said={"config": json.dumps(values)})
    assert read(path).record.config == replace(memory().record.config, retention="features")


def test_slots_that_another_label_set_scored_may_be_less_sure_than_this_one_could_be(path: Path) -> None:
    given(path, {"dynamic.entropies": np.array([0, 0, 0, 0, math.log(4)])}, said={"labelling": "earlier"})
    assert read(path).slots[EEL].entropies == (0.0, math.log(4))
    given(path, {"dynamic.entropies": np.array([0, 0, 0, 0, 2.0])}, said={"labelling": "earlier"})
    with pytest.raises(InvalidRequest, match="entropy"):
        read(path)


def test_exactly_the_limits_are_allowed(path: Path) -> None:
    stored = memory()
    writer.write(stored, path, created=CREATED)
    exact = Settings(max_classes=3, max_prompts=7, max_slots=3, max_shots=2, tenant_max_bytes=7 * DIM * 2 + 14)
    assert read(path, exact) == stored


# What is refused ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """A tensor as its header has it, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


_NAMES = {np.dtype("<f8"): "F64", np.dtype("<i8"): "I64", np.dtype("<i4"): "I32", np.dtype("<f2"): "F16"}


def raw(column: np.ndarray[Any, Any]) -> Raw:
    return Raw(_NAMES.get(column.dtype, "U8"), column.shape, column.tobytes())


def head_of(data: bytes) -> tuple[dict[str, Any], int]:
    """Return a file's header and where it ends."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), end


def packed(header: Mapping[str, Any] | bytes, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def columns_of(data: bytes) -> tuple[dict[str, Any], dict[str, Raw]]:
    header, start = head_of(data)
    said = header.pop("__metadata__")
    columns = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        columns[name] = Raw(entry["dtype"], tuple(entry["shape"]), data[start + begin : start + end])
    return said, columns


def given(
    path: Path,
    columns: Mapping[str, np.ndarray[Any, Any] | Raw | None] | None = None,
    *,
    said: Mapping[str, Any] | None = None,
    stored: StoredMemory | None = None,
) -> None:
    """Write a file whose columns and metadata differ from those of a good one; None leaves one out."""
    writer.write(stored or memory(), path, created=CREATED)
    metadata, known = columns_of(path.read_bytes())
    changed = {name: raw(own) if isinstance(own, np.ndarray) else own for name, own in (columns or {}).items()}
    header: dict[str, Any] = {
        "__metadata__": {name: value for name, value in {**metadata, **(said or {})}.items() if value is not None}
    }
    body = b""
    for name, column in {**known, **changed}.items():
        if column is not None:
            offsets = [len(body), len(body) + len(column.data)]
            header[name] = {"dtype": column.dtype, "shape": column.shape, "data_offsets": offsets}
            body += column.data
    path.write_bytes(packed(header, body))


def lines(*ids: str) -> np.ndarray[Any, Any]:
    return np.frombuffer("\n".join(ids).encode(), np.uint8)


def rows(*features: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(b"".join(features), "<f2").reshape(len(features), -1)


def i32(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, "<i4")


def spoilt(value: float, row: int = 2) -> np.ndarray[Any, Any]:
    """Return the dynamic features with one entry changed."""
    good = rows(*(feature(seed) for seed in range(5))).copy()
    good[row, 1] = value
    return good


def test_the_helper_of_these_tests_changes_nothing_that_it_is_not_told_to(path: Path) -> None:
    given(path)
    assert read(path) == memory()


COLUMNS: dict[str, tuple[dict[str, np.ndarray[Any, Any] | Raw | None], str]] = {
    "unknown tensor": ({"projection.key": np.zeros(3)}, "has the tensor 'projection.key', which version '1' does not"),
    "missing tensor": ({"barred.ids": None}, "lacks the tensor 'barred.ids'"),
    "other type": ({"dynamic.entropies": np.zeros(5, "<i8")}, "'dynamic.entropies' is of type 'I64'; expected F64"),
    "other rank": ({"dynamic.entropies": np.zeros((5, 1))}, "shape of the tensor 'dynamic.entropies' is not 1 whole"),
    "rows of entropies": ({"dynamic.entropies": np.zeros(4)}, "'dynamic.entropies' have 5 and 4 rows"),
    "rows of features": ({"dynamic.features": spoilt(0)[:4]}, "'dynamic.features' have 5 and 4 rows"),
    "rows of flags": ({"static.has_feature": np.ones(2, "u1")}, "'static.has_feature' have 3 and 2 rows"),
    "rows of sizes": ({"static.image_sizes": np.array([7, 7, 0, 0])}, "'static.image_sizes' have 3 and 4 rows"),
    "two feature sizes": ({"static.features": rows(feature(1, 5), feature(2, 5))}, "have 4 and 5 entries"),
    "features of no size": (
        {"dynamic.features": np.zeros((5, 0), "<f2"), "static.features": np.zeros((2, 0), "<f2")},
        "have 0 entries",
    ),
    "huge features": (
        {"dynamic.features": Raw("F16", (0, 1 << 40), b"")},
        "features of 1099511627776 entries; at most 65536",
    ),
    "class beyond": ({"dynamic.classes": i32(0, 0, 0, 2, 3)}, "dynamic.classes names a class beyond the 3"),
    "class below": ({"static.classes": i32(-1, 0, 1)}, "static.classes names a class beyond the 3"),
    "barred class beyond": ({"barred.classes": i32(0, 0, 9)}, "barred.classes names a class beyond the 3"),
    "classes out of order": ({"dynamic.classes": i32(0, 0, 2, 1, 2)}, "not in the order of the classes"),
    "too many slots": ({"dynamic.classes": i32(0, 0, 0, 0, 2)}, "'cat' has 4 slots in the file; at most 3"),
    "slots out of order": (
        {"dynamic.entropies": np.array([0.2, 0.1, 0.3, 0, 0])},
        "slots of the class 'cat' are not in the order of entropy and id",
    ),
    "equal entropies out of order": (
        {"dynamic.ids": lines("a", "c", "b", "a", "b"), "dynamic.entropies": np.zeros(5)},
        "slots of the class 'cat' are not in the order of entropy and id",
    ),
    "id twice": ({"dynamic.ids": lines("a", "b", "a", "a", "b")}, "Two slots of the class 'cat' have the same id"),
    "shot twice": ({"static.ids": lines("s0", "s1", "s0")}, "Two shots have the same id"),
    "shots out of order": ({"static.ids": lines("s2", "s1", "s0")}, "shots of the class 'cat' are not in the order"),
    "barred twice": ({"barred.ids": lines("x", "x", "a")}, "Two barred ids of the class 'cat' have the same id"),
    "barred out of order": ({"barred.ids": lines("y", "x", "a")}, "barred ids of the class 'cat' are not in order"),
    "barred and held": ({"barred.ids": lines("a", "y", "a")}, "'cat' holds a slot whose id is barred"),
    "too few ids": ({"dynamic.ids": lines("a", "b", "c", "a")}, "dynamic.ids is not one id .* a line for 5 rows"),
    "too many ids": ({"static.ids": lines("a", "b", "c", "d")}, "static.ids is not one id .* a line for 3 rows"),
    "ids for nothing": (
        {"barred.ids": lines("a"), "barred.classes": i32()},
        "barred.ids is not one id .* a line for 0 rows",
    ),
    "empty id": ({"static.ids": lines("", "s1", "s2")}, "id in static.ids is not 1 to 64 letters"),
    "long id": ({"static.ids": lines("s" * 65, "s1", "s2")}, "id in static.ids is not 1 to 64 letters"),
    "ids too long": ({"static.ids": lines("s" * 199, "s1", "s2")}, "static.ids is not one id of at most 64"),
    "odd id": ({"static.ids": lines("s 0", "s1", "s2")}, "id in static.ids is not 1 to 64 letters"),
    "id beyond ASCII": ({"static.ids": lines("s\u00e9", "s1", "s2")}, "id in static.ids is not 1 to 64 letters"),
    "NaN entropy": ({"dynamic.entropies": np.array([0, 0, math.nan, 0, 0])}, "entropy in the file is no number"),
    "infinite entropy": ({"dynamic.entropies": np.array([0, 0, math.inf, 0, 0])}, "entropy in the file is no number"),
    "negative entropy": ({"dynamic.entropies": np.array([-2e-6, 0, 0, 0, 0])}, "no number from 0 to 1.100 nats"),
    "entropy of more classes": ({"dynamic.entropies": np.array([0, 0, 1.11, 0, 0])}, "no number from 0 to 1.100"),
    "NaN feature": ({"dynamic.features": spoilt(math.nan)}, "dynamic.features holds a value that is not finite"),
    "infinite feature": ({"dynamic.features": spoilt(-math.inf)}, "dynamic.features holds a value that is not finite"),
    "long feature": ({"dynamic.features": spoilt(1.5)}, "dynamic.features has not the length 1"),
    "zero feature": ({"static.features": rows(feature(1), bytes(8))}, "static.features has not the length 1"),
    "flag of two": ({"static.has_feature": np.array([1, 2, 0], "u1")}, "does not tell which shots the 2 features"),
    "fewer flags": ({"static.has_feature": np.array([0, 0, 1], "u1")}, "does not tell which shots the 2 features"),
    "flags and features": ({"static.has_feature": np.ones(3, "u1")}, "does not tell which shots the 2 features"),
    "shot of nothing": (
        {"static.has_feature": np.array([1, 1, 0], "u1")},
        "The shot 's0' has neither a feature nor an image",
    ),
    "sizes too large": ({"static.image_sizes": np.array([7, 8, 0])}, "do not add up to the 14 bytes"),
    "sizes too small": ({"static.image_sizes": np.array([7, 6, 0])}, "do not add up to the 14 bytes"),
    "negative size": ({"static.image_sizes": np.array([8, 7, -1])}, "do not add up to the 14 bytes"),
    "sizes that overflow": ({"static.image_sizes": np.array([2**63 - 1, 2**63 - 1, 16])}, "do not add up to the 14"),
}


@pytest.mark.parametrize(("columns", "words"), COLUMNS.values(), ids=COLUMNS)
def test_columns_that_do_not_fit_are_refused(
    columns: Mapping[str, np.ndarray[Any, Any] | Raw | None], words: str, path: Path
) -> None:
    given(path, columns)
    with pytest.raises(InvalidRequest, match=words):
        read(path)


@pytest.mark.parametrize("row", range(5))
def test_no_feature_of_many_is_overlooked(row: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKED_ENTRIES", 2 * DIM)
    given(path, {"dynamic.features": spoilt(0.9, row)})
    with pytest.raises(InvalidRequest, match="has not the length 1"):
        read(path)


def config_of(**changed: Any) -> str:
    """Return a configuration as JSON that differs in some fields."""
    return json.dumps({**json.loads(memory().record.config.to_json()), **changed})


def classes_of(*classes: Any) -> str:
    return config_of(classes=[{"name": one, "prompts": []} if isinstance(one, str) else one for one in classes])


METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "no format": ({"format": None}, "no exported memory: its metadata does not say the format 'dmn-memory'"),
    "other format": ({"format": "pt"}, "no exported memory"),
    "later version": ({"version": "2"}, "of version '2' of its format; this service reads version '1'"),
    "no version": ({"version": None}, "does not say the version of its format"),
    "version that is no text": ({"version": 1}, "does not say the version of its format"),
    "unknown metadata": ({"note": "x"}, "has the metadata 'note', which version '1' does not know"),
    "missing metadata": ({"origin": None}, "lacks the metadata 'origin'"),
    "no fingerprint": ({"fingerprint": None}, "lacks the metadata 'fingerprint'"),
    "empty fingerprint": ({"fingerprint": ""}, "does not say the fingerprint"),
    "long labelling": ({"labelling": "x" * 65}, "'labelling' is no text of at most 64 characters"),
    "labelling that is no text": ({"labelling": ["x"]}, "'labelling' is no text"),
    "control character": ({"labelling": "a\nb"}, "'labelling' holds a control character"),
    "half a character": ({"fingerprint": "\ud800"}, "'fingerprint' holds a control character or is not valid Unicode"),
    "bad tenant": ({"tenant": "../zoo"}, "A tenant name starts with"),
    "bad time": ({"created": "yesterday"}, "'created' is 'yesterday', which is no time"),
    "negative epoch": ({"epoch": "-1"}, "'epoch' is '-1', which is no whole number"),
    "epoch in other digits": ({"epoch": "\u0661"}, "'epoch' is .*, which is no whole number"),
    "epoch of nothing": ({"epoch": ""}, "'epoch' is '', which is no whole number"),
    "huge version": ({"memory_version": "9" * 16}, "'memory_version' is no text of at most 15"),
    "origin that is no JSON": ({"origin": "lite"}, "origin is no valid JSON"),
    "origin that is no object": ({"origin": "[]"}, "origin is no JSON object"),
    "origin of numbers": ({"origin": '{"dim": 4}'}, "'origin' is no text"),
    "origin named twice": ({"origin": '{"a": "1", "a": "2"}'}, "names 'a' twice"),
    "origin of odd names": ({"origin": '{"a\\u0000": "b"}'}, "'origin' holds a control character"),
    "origin of control characters": ({"origin": '{"a": "\\u0000"}'}, "'origin' holds a control character"),
    "config that is no JSON": ({"config": "{"}, "configuration is no valid JSON"),
    "config that is no object": ({"config": "[]"}, "configuration is no JSON object"),
    "deep config": ({"config": '{"classes": ' + "[" * 5000 + "]" * 5000 + "}"}, "configuration is no valid JSON"),
    "config of too much": ({"config": '{"classes": [' + "[]," * 9000 + "[]]}"}, "holds more values than are allowed"),
    "templates that are no texts": (
        {"config": config_of(templates=[1] * 100)},
        "at 'templates': not all of them are texts",
    ),
    "unknown field": ({"config": config_of(colour="red")}, "has the field 'colour'"),
    "unknown field of a class": (
        {"config": classes_of("cat", "dog", {"name": "eel", "prompts": [], "weight": 1})},
        "has the field 'weight'",
    ),
    "field twice": ({"config": '{"slots": 3, "slots": 3}'}, "names 'slots' twice"),
    "number as text": ({"config": config_of(slots="3")}, "wrong at 'slots': Input should be a valid integer"),
    "truth as number": ({"config": config_of(slots=True)}, "wrong at 'slots': Input should be a valid integer"),
    "class that is a list": ({"config": config_of(classes=[[]])}, "a class without a name"),
    "class without a name": ({"config": classes_of({"prompts": []})}, "a class without a name"),
    "class that is a text": ({"config": config_of(classes=["cat", "dog", "eel"])}, "a class without a name"),
    "classes that are no list": ({"config": config_of(classes={})}, "wrong at 'classes': it is no list"),
    "prompts that are a text": (
        {"config": classes_of({"name": "cat", "prompts": "cat"})},
        "wrong at 'prompts': it is no list",
    ),
    "huge number": ({"config": config_of(beta=10**400)}, "wrong at 'beta'|beta must be a finite number"),
    "weights that are texts": ({"config": config_of(weights=["1", "1", "1"])}, "wrong at 'weights'"),
    "weights that are a number": ({"config": config_of(weights=1)}, "wrong at 'weights': it is no list"),
    "many weights": ({"config": config_of(weights=[1] * 99)}, "wrong at 'weights'"),
    "two weights": ({"config": config_of(weights=[1, 1])}, "at 'weights"),
    "weights of nothing": ({"config": config_of(weights=[0, 0, 0])}, "weights must be finite"),
    "infinite beta": ({"config": config_of(beta=math.inf)}, "beta must be a finite number"),
    "unknown retention": ({"config": config_of(retention="all")}, "at 'retention'"),
    "class twice": ({"config": classes_of("cat", "dog", "cat")}, "'cat' is named twice"),
    "name of half a character": ({"config": classes_of("cat", "dog", "\ud800")}, "class name is not valid"),
    "untidy name": ({"config": classes_of("cat", "dog ", "eel")}, "not tidy"),
    "name that is not NFC": ({"config": classes_of("cat", "dog", "ee\u0301l")}, "not tidy"),
}


@pytest.mark.parametrize(("said", "words"), METADATA.values(), ids=METADATA)
def test_metadata_that_do_not_fit_are_refused(said: Mapping[str, Any], words: str, path: Path) -> None:
    given(path, said=said)
    with pytest.raises(InvalidRequest, match=words):
        read(path)


OVER = {
    "bytes": (
        Settings(tenant_max_bytes=7 * DIM * 2 + 13),
        "holds 70 bytes of features, images and offsets; a tenant may",
    ),
    "shots": (Settings(max_shots=1), "'cat' has 2 shots in the file; at most 1 are allowed"),
    "classes": (Settings(max_classes=2), "3 classes were given; at most 2"),
    "slots": (Settings(max_slots=2), "3 slots a class were given; at most 2"),
    "templates": (Settings(max_prompts=6), "7 templates were given; at most 6"),
    "barred ids": (Settings(max_slots=3, max_classes=3), "bars more than 9 ids"),
}


@pytest.mark.parametrize(("settings", "words"), OVER.values(), ids=OVER)
def test_more_than_a_tenant_may_have_is_refused(settings: Settings, words: str, path: Path) -> None:
    barred = frozenset((DOG, f"{n:02}") for n in range(10))
    given(path, stored=replace(memory(), barred=barred) if "bars" in words else memory())
    with pytest.raises(LimitExceeded, match=words):
        read(path, settings)


def edited(change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return a good file whose header was changed and whose body was not."""
    data = b"".join(writer.parts(memory(), created=CREATED))
    header, start = head_of(data)
    change(header)
    return packed(header, data[start:])


def entry(name: str, **changed: Any) -> bytes:
    return edited(lambda header: header[name].update(changed))


GOOD = b"".join(writer.parts(memory(), created=CREATED))
HEAD, END = head_of(GOOD)
TEXT = GOOD[8:END]
SIZE = len(GOOD) - END

FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "too short to have a header"),
    "half a length": (GOOD[:7], "too short to have a header"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(100), "no safetensors file, or is cut off: it announces a header of 727"),
    "huge header": (b"\xff" * 8 + GOOD[8:], "announces a header of 18446744073709551615 bytes"),
    "header beyond the end": (GOOD[: END - 1], "is cut off: it announces a header of"),
    "header of nothing": (packed(b""), "header is no valid JSON"),
    "header that is no JSON": (packed(b"{" * 3), "header is no valid JSON"),
    "header that is no object": (packed(b"[]"), "header is no JSON object"),
    "header that is not UTF-8": (packed(b'{"\xff": 1}'), "header is no valid JSON"),
    "header in UTF-16": (packed('{"a": 1}'.encode("utf-16")), "header is no valid JSON"),
    "deep header": (packed(b'{"a":' + b"[" * 7000 + b"]" * 7000 + b"}"), "header is no valid JSON"),
    "header of many values": (packed(b'{"a":[' + b"[]," * 9000 + b"[]]}"), "holds more values than are allowed"),
    "header with an endless string": (packed(b'{"' + b"a" * 20000), "header is no valid JSON"),
    "header of many strings": (packed(b'""' * 20000), "is no JSON, or holds more"),
    "header of a string that never begins": (packed(b'"\\' * 20000), "header is no valid JSON"),
    "number without end": (packed(b'{"a":' + b"9" * 5000 + b"}"), "header is no valid JSON"),
    "no metadata": (edited(lambda header: header.pop("__metadata__")), "no exported memory"),
    "metadata that are a list": (edited(lambda header: header.update(__metadata__=[])), "no exported memory"),
    "metadata twice": (packed(b'{"__metadata__":{},' + TEXT[1:], GOOD[END:]), "names '__metadata__' twice"),
    "one of the metadata twice": (
        packed(TEXT.replace(b'{"format":', b'{"epoch":"1","format":'), GOOD[END:]),
        "names 'epoch' twice",
    ),
    "tensor twice": (
        packed(b'{"static.ids":{},' + TEXT[1:], GOOD[END:]),
        "names 'static.ids' twice",
    ),
    "cut in its body": (GOOD[:-1], f"cut off, or too long: its tensors take {SIZE} bytes and it has {SIZE - 1}"),
    "longer than it says": (GOOD + b"\0", f"its tensors take {SIZE} bytes and it has {SIZE + 1}"),
    "overlap": (
        entry("static.has_feature", data_offsets=[o - 1 for o in HEAD["static.has_feature"]["data_offsets"]]),
        "overlap or leave a gap",
    ),
    "gap": (
        entry("static.has_feature", data_offsets=[o + 1 for o in HEAD["static.has_feature"]["data_offsets"]]),
        "overlap or leave a gap",
    ),
    "backwards": (entry("static.images", data_offsets=[SIZE, SIZE - 14]), "has -14 bytes, which is not what"),
    "negative offset": (entry("static.images", data_offsets=[-14, 0]), "'static.images' is not 2 whole numbers"),
    "three offsets": (entry("static.images", data_offsets=[0, 0, 0]), "'static.images' is not 2 whole numbers"),
    "fractional shape": (entry("static.images", shape=[14.0]), "'static.images' is not 1 whole numbers"),
    "true shape": (entry("barred.classes", shape=[True]), "'barred.classes' is not 1 whole numbers"),
    "negative shape": (entry("dynamic.features", shape=[-5, -4]), "'dynamic.features' is not 2 whole numbers"),
    "shape beyond 64 bits": (entry("static.images", shape=[2**64 + 14]), "'static.images' is not 1 whole numbers"),
    "shape that would wrap": (entry("dynamic.features", shape=[2**62, 4]), "not what its shape takes"),
    "shape that is no list": (entry("static.images", shape="14"), "'static.images' is not 1 whole numbers"),
    "shape of other bytes": (entry("static.images", shape=[15]), "has 14 bytes, which is not what its shape takes"),
    "type that is none": (entry("static.images", dtype=["U8"]), "is of type no text; expected U8"),
    "entry with more": (entry("static.images", device="cpu"), "not described by dtype, shape and data_offsets"),
    "entry that is no object": (
        edited(lambda header: header.update({"static.images": 1})),
        "not described by dtype, shape and data_offsets",
    ),
    "rows by another's name": (
        packed(TEXT.replace(b'"static.ids"', b'"static.IDS"'), GOOD[END:]),
        "lacks the tensor 'static.ids'",
    ),
}


@pytest.mark.parametrize(("data", "words"), FILES.values(), ids=FILES)
def test_a_container_that_does_not_add_up_is_refused(data: bytes, words: str, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(InvalidRequest, match=words):
        read(path)


def test_a_header_of_what_a_great_configuration_takes_is_read(path: Path) -> None:
    """Many classes and sentences, with marks in them that JSON uses itself."""
    sentence = 'a photo of {} "quoted" [with] \\ marks, '
    specs = tuple(ClassSpec(name=f"class {n}", prompts=(sentence.strip(),) * 128) for n in range(200))
    config = TenantConfig(classes=specs)
    stored = emptied(record=replace(memory().record, config=config, labelling=config.labelling))
    writer.write(stored, path, created=CREATED)
    assert read(path, Settings(max_classes=200)) == stored


def test_a_refusal_says_what_the_file_said_in_few_plain_characters(path: Path) -> None:
    given(path, said={"version": "\u202e" + "x" * 10000})
    with pytest.raises(InvalidRequest) as caught:
        read(path)
    assert caught.value.detail.isascii()
    assert len(caught.value.detail) < 300
