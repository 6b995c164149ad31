"""The metadata of an export file: tenant, configuration, encoder, training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from service.domain.memory import (
    Stamp,
    TenantRecord,
    Training,
)
from service.domain.tenant import ClassSpec, TenantConfig, checked, tenant_name
from service.errors import DuplicateClass, InvalidRequest
from service.settings import Settings

from .columns import METADATA_CHARS, TRAINING_CHARS, TRAINING_KEY, quoted
from .container import INT64, LARGEST_DIM, MOST_MARKS, check_text, parse_json

_CLASS_MARKS, _PROMPT_MARKS = 64, 4
_PERCENT = 100.0
_BRANCHES = ("text", "static", "fused")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def record_of(metadata: Mapping[str, str], settings: Settings) -> TenantRecord:
    """Return the tenant record that a file's metadata describes."""
    if not metadata["fingerprint"]:
        raise InvalidRequest("The file does not say the fingerprint of the encoder that its features came from.")
    _check_time(metadata["created"])
    return TenantRecord(
        name=tenant_name(metadata["tenant"]),
        config=_config(metadata["config"], settings),
        fingerprint=metadata["fingerprint"],
        stamp=Stamp(epoch=_count("epoch", metadata), version=_count("memory_version", metadata)),
        labelling=metadata["labelling"],
        origin=_origin(metadata["origin"]),
        training=_training(metadata[TRAINING_KEY]) if TRAINING_KEY in metadata else None,
    )


def _training(text: str) -> Training:
    """Return what a file says of its offsets, every number finite and in its range."""
    found, hints = parse_json(text.encode(), "training", TRAINING_CHARS), get_type_hints(Training)
    if set(found) != set(hints):
        raise InvalidRequest("The file's training lacks a field, or has one that is not known here.")
    training = Training(**{name: _of_type(hints[name], name, value, "training") for name, value in found.items()})
    branches = [training.before or {}, training.after or {}]
    counts = (training.seed, training.epochs, training.shots, training.dim)
    percents = [value for branch in branches for value in branch.values()]
    if (
        not _ID.fullmatch(training.id)
        or min(counts) < 0
        or not 0 < training.dim <= LARGEST_DIM
        or max(counts) not in INT64
    ):
        raise InvalidRequest("The file's training has an id or a number that cannot be.")
    if not all(name in _BRANCHES and 0 <= value <= _PERCENT for one in branches for name, value in one.items()):
        raise InvalidRequest("The file's training has a held-out accuracy that is no percentage of a known branch.")
    if not all(map(math.isfinite, (training.created, training.learning_rate, *percents))):
        raise InvalidRequest("The file's training has a number that is not finite.")
    return training


def _check_time(text: str) -> None:
    try:
        datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequest(f"The metadata 'created' is {quoted(text)}, which is no time in ISO 8601.") from error


def _count(name: str, metadata: Mapping[str, str]) -> int:
    text = metadata[name]
    if not (text.isascii() and text.isdigit()):
        raise InvalidRequest(f"The metadata {name!r} is {quoted(text)}, which is no whole number from 0 on.")
    return int(text)


def _origin(text: str) -> dict[str, str]:
    found = parse_json(text.encode(), "origin", MOST_MARKS)
    for name, value in found.items():
        check_text("origin", name, METADATA_CHARS["origin"])
        check_text("origin", value, METADATA_CHARS["origin"])
    return found


def _config(text: str, settings: Settings) -> TenantConfig:
    """Return the configuration of a file, as `TenantConfig.to_json` wrote it, within the limits."""
    marks = MOST_MARKS + settings.max_classes * (_CLASS_MARKS + _PROMPT_MARKS * settings.max_prompts)
    config = _typed(parse_json(text.encode(), "configuration", marks))
    try:
        tidy = checked(config, settings)
    except DuplicateClass as error:
        raise InvalidRequest(f"The file's configuration is wrong: {error.detail}") from error
    if tidy != config:
        raise InvalidRequest("The file's configuration has names or sentences that are not tidy: NFC, no space around.")
    return config


def _typed(values: Mapping[str, Any]) -> TenantConfig:
    """Return the configuration of parsed JSON; a field that an older release lacks has what it did then."""
    _check_fields(values, TenantConfig)
    # What there may be many of is looked at here, up to the first fault: pydantic would make an object for each.
    typed = {"method": "dmn", **values}
    if "classes" in values:
        typed["classes"] = tuple(_spec(one) for one in _list(values["classes"], "classes"))
    if "templates" in values:
        typed["templates"] = _texts(values["templates"], "templates")
    if "weights" in values:
        typed["weights"] = tuple(_list(values["weights"], "weights"))
    hints = get_type_hints(TenantConfig)
    return TenantConfig(**{name: _of_type(hints[name], name, value) for name, value in typed.items()})


def _of_type(kind: Any, name: str, value: Any, what: str = "configuration") -> Any:
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]["msg"]
        raise InvalidRequest(f"The file's {what} is wrong at {name!r}: {fault}.") from error


def _spec(found: Any) -> ClassSpec:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise InvalidRequest("The file's configuration has a class without a name.")
    _check_fields(found, ClassSpec)
    return ClassSpec(name=found["name"], prompts=_texts(found.get("prompts", []), "prompts"))


def _texts(found: Any, what: str) -> tuple[str, ...]:
    if not all(isinstance(one, str) for one in _list(found, what)):
        raise InvalidRequest(f"The file's configuration is wrong at {what!r}: not all of them are texts.")
    return tuple(found)


def _list(found: Any, what: str) -> list[Any]:
    if not isinstance(found, list):
        raise InvalidRequest(f"The file's configuration is wrong at {what!r}: it is no list.")
    return found


def _check_fields(values: Mapping[str, Any], kind: type[TenantConfig | ClassSpec]) -> None:
    for name in set(values).difference(one.name for one in fields(kind)):
        raise InvalidRequest(f"The file's configuration has the field {quoted(name)}, which is not known here.")
