"""Checks of an export file's values: sizes, ids, features, sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from service.domain.memory import (
    StoredBank,
    StoredShot,
    TenantRecord,
)
from service.domain.tenant import ClassSpec, TenantConfig
from service.errors import InvalidRequest, LimitExceeded
from service.settings import Settings

from .columns import ID_CHARS, Columns

_ID_BYTES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
CHECKED_ENTRIES = 1 << 20
_UNIT_TOLERANCE = 0.01
LARGEST_OFFSET = 1e6
_LARGEST_SUM = 1e12
NATS_BELOW, _NATS_ABOVE = 1e-6, 1e-3


def check_sizes(columns: Columns, settings: Settings) -> None:
    """Return if rows agree in number, features in size, and all together are no more bytes than a tenant may hold."""
    for first, *others in (
        ("dynamic.classes", "dynamic.entropies", "dynamic.features"),
        ("static.classes", "static.has_feature", "static.image_sizes"),
    ):
        for other in others:
            if len(columns[other]) != len(columns[first]):
                raise InvalidRequest(
                    f"The tensors {first!r} and {other!r} have {len(columns[first])} and {len(columns[other])} rows."
                )
    features = [columns["dynamic.features"], columns["static.features"]]
    dims = {rows.shape[1] for rows in features if len(rows)}
    if len(dims) > 1 or 0 in dims:
        raise InvalidRequest(f"Features have {' and '.join(map(str, sorted(dims)))} entries; expected one size.")
    offsets = columns["offsets.rows"].nbytes if "offsets.rows" in columns else 0
    total = sum(rows.nbytes for rows in features) + columns["static.images"].nbytes + offsets
    if total > settings.tenant_max_bytes:
        raise LimitExceeded(
            f"The file holds {total} bytes of features, images and offsets; a tenant may hold "
            f"{settings.tenant_max_bytes}."
        )


def most_slots_and_entropy(record: TenantRecord, settings: Settings) -> tuple[int, float]:
    """Return how many slots a class may have, and the largest entropy of one.

    Slots that another label set scored wait to be scored anew, and until then stand as that one left them.
    """
    current = record.labelling == record.due_labelling
    slots = record.config.slots if current else max(record.config.slots, settings.max_slots)
    classes = len(record.config.classes) if current else settings.max_classes
    return slots, math.log(max(1, classes)) + _NATS_ABOVE


def check_bank(bank: StoredBank, name: str, most: int) -> None:
    """Check the slots of one class: number, ids, order, entropies, features."""
    if len(bank) > most:
        raise InvalidRequest(f"The class {name!r} has {len(bank)} slots in the file; at most {most} are allowed.")
    check_once(bank.ids, "slots", name)
    order = list(zip(bank.entropies, bank.ids, strict=True))
    if order != sorted(order):
        raise InvalidRequest(f"The slots of the class {name!r} are not in the order of entropy and id.")


def check_shots(own: Sequence[StoredShot], name: str) -> None:
    """Check the shots of one class: ids, order, features."""
    ids = [shot.id for shot in own]
    if ids != sorted(ids):
        raise InvalidRequest(f"The shots of the class {name!r} are not in the order of their ids.")
    for shot in own:
        if not shot.feature and shot.image is None:
            raise InvalidRequest(f"The shot {shot.id!r} has neither a feature nor an image.")


def check_sums(rows: NDArray[np.float32], shared: NDArray[np.float32], dim: int) -> None:
    """Return if sums are such as unit-norm features can make: none is larger than how many images are in it."""
    step, slack = max(1, CHECKED_ENTRIES // max(1, dim)), 1 + 2 * _UNIT_TOLERANCE
    parts = [rows[at : at + step] for at in range(0, len(rows), step)]
    if not all((np.abs(part) <= _LARGEST_SUM).all() for part in (*parts, shared)):
        raise InvalidRequest(f"A sum in the file's class statistics is no finite number up to {_LARGEST_SUM:g}.")
    images, squares = shared[0], shared[1 + dim : 1 + dim + dim * dim : dim + 1]
    if any((part < 0).any() for part in (rows[:, 0], shared[:1], squares, shared[1 + dim + dim * dim :])):
        raise InvalidRequest("The file's class statistics count fewer than no images.")
    if (rows[:, 0] > slack * images).any() or (np.abs(shared) > slack * images).any():
        raise InvalidRequest("A sum in the file's class statistics is larger than its images can make it.")
    if any((np.abs(part) > slack * part[:, :1]).any() for part in parts):
        raise InvalidRequest("A sum in the file's class statistics is larger than the images of its class can make it.")


def class_ends(columns: Columns, what: str, config: TenantConfig) -> list[int]:
    """Return the row after the last one of each class."""
    rows, count = columns[f"{what}.classes"], len(config.classes)
    if ((rows < 0) | (rows >= count)).any():
        raise InvalidRequest(f"{what}.classes names a class beyond the {count} of the configuration.")
    if (rows[1:] < rows[:-1]).any():
        raise InvalidRequest(f"The rows of {what}.classes are not in the order of the classes.")
    ends: list[int] = np.searchsorted(rows, np.arange(count), side="right").tolist()
    return ends


def class_stretches(config: TenantConfig, ends: Sequence[int]) -> Iterator[tuple[ClassSpec, int, int]]:
    """Yield each class that has rows, with its first one and the one after its last."""
    for spec, begin, end in zip(config.classes, (0, *ends), ends, strict=False):
        if end > begin:
            yield spec, begin, end


def row_ids(columns: Columns, what: str) -> list[str]:
    """Return the ids of rows, each of letters, digits, dots, underscores and hyphens, 64 at most."""
    count, lines = len(columns[f"{what}.classes"]), columns[f"{what}.ids"]
    # Before the lines are split: the bytes are then no more than the longest ids would take.
    if len(lines) > count * (ID_CHARS + 1) or np.count_nonzero(lines == ord("\n")) != max(0, count - 1):
        raise InvalidRequest(f"{what}.ids is not one id of at most {ID_CHARS} characters a line for {count} rows.")
    text = lines.tobytes()
    ids = text.decode("latin-1").split("\n") if count else []
    if text.translate(None, _ID_BYTES + b"\n") or not all(0 < len(id_) <= ID_CHARS for id_ in ids):
        raise InvalidRequest(
            f"An id in {what}.ids is not 1 to {ID_CHARS} letters, digits, dots, underscores and hyphens."
        )
    return ids


def check_once(ids: Sequence[str], what: str, name: str | None = None) -> None:
    """Raise InvalidRequest if an id comes twice."""
    if len(set(ids)) != len(ids):
        where = "" if name is None else f" of the class {name!r}"
        raise InvalidRequest(f"Two {what}{where} have the same id.")


def check_features(features: NDArray[np.float16], what: str) -> None:
    """Return if every feature is finite and of unit norm, as near as half precision comes to it."""
    step = max(1, CHECKED_ENTRIES // max(1, features.shape[1]))
    for start in range(0, len(features), step):
        rows = features[start : start + step].astype(np.float32)
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        if not np.isfinite(norms).all():
            raise InvalidRequest(f"A feature in {what}.features holds a value that is not finite.")
        if (np.abs(norms - 1.0) > _UNIT_TOLERANCE).any():
            raise InvalidRequest(f"A feature in {what}.features has not the length 1.")
