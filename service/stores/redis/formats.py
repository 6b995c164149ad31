"""What releases that share a store may expect of each other: two run side by side whenever one takes another's place.

The store has a *major* format and every tenant a *minor* one.

A release may, without any number, add what one that does not know it can pass over, and leave as it is:
- a key under a tenant's tag; it has to go by itself, since such a release does not remove it with the tenant;
- a field of a tenant's hash; it has to be right, or repaired by whoever needs it, however the others change the tenant;
- a value of a record in JSON (a snapshot's, a job's, a training's) with a default for those without; not of an API
  key's, where it might be what the key is not good for: a key with a value that is not known opens nothing.

A new *minor* format, one more in `FORMATS`, is for what a tenant has that others would misread, lose or answer without:
a method, a memory, a value of its configuration. A tenant is written in the least format that has all of its own, so
one that uses nothing new stays everybody's. One of a format that a release does not know is refused by it, alone, in
one sentence, and nothing of it is changed; the others go on. A value of the configuration is written only where it is
not what releases without it take for granted.

A new *major* format is for what all tenants have in common: how keys are named and features coded, what the scripts of
several workers agree on, stamps, the rule of the write. A store without a note is of the first. Whoever brings one to
another major format notes that first, and gives every tenant that it touches a minor format that no release of the old
one knows: then those that still run refuse it tenant by tenant, and none starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from service.domain.memory import Training
from service.domain.tenant import TenantConfig
from service.errors import FingerprintMismatch

MAJOR = 1

FORMAT = 1
"""Minor format of a tenant with the method `dmn` and nothing trained; and of every record in JSON."""

WITH_OFFSETS = 2
"""That of a tenant that has trained offsets."""

WITH_STATISTICS = 3
"""That of a tenant with the method `auto`, with or without offsets."""

FORMATS = (FORMAT, WITH_OFFSETS, WITH_STATISTICS)
"""The minor formats that this release knows."""


def format_of(config: TenantConfig, training: Training | None) -> int:
    """Return the least format whose releases know all that a tenant has."""
    if config.method == "auto":
        return WITH_STATISTICS
    return FORMAT if training is None else WITH_OFFSETS


def check_major(noted: bytes | None) -> None:
    """Return if a store is of our major format.

    Raises:
        FingerprintMismatch: it is not.
    """
    found = str(MAJOR) if noted is None else noted.decode(errors="replace")
    if found != str(MAJOR):
        raise FingerprintMismatch(
            f"The store is of format {found}; this version reads {MAJOR}. Nothing was changed. Serve it with the "
            "version that wrote it, or name another store by DMN_STORE."
        )


def check_minor(found: str, tenant: str) -> None:
    """Return if we know all that a tenant of this format may have.

    Raises:
        FingerprintMismatch: we do not.
    """
    if found not in map(str, FORMATS):
        raise other_format(f"The tenant {tenant!r}", found)


def known(text: bytes, kind: type, what: str, *, strict: bool = False) -> dict[str, Any]:
    """Return the values of a record in JSON that a dataclass has a field for; others are passed over unless `strict`.

    Raises:
        FingerprintMismatch: it is of another format, or has values that must not be passed over.
    """
    values: dict[str, Any] = json.loads(text)
    found = values.pop("format", None)
    if found != FORMAT:
        raise other_format(what, str(found))
    fits = fitting(values, kind)
    if strict and len(fits) < len(values):
        raise other_format(what, f"{FORMAT} with more in it")
    return fits


def fitting(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return the values that a dataclass has a field for."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def other_format(what: str, found: str = "another") -> FingerprintMismatch:
    """Return why something is refused."""
    *others, last = map(str, FORMATS)
    return FingerprintMismatch(
        f"{what} is stored in format {found}; this version reads {', '.join(others)} and {last}. Nothing was changed. "
        "Serve it with the version that wrote it."
    )
