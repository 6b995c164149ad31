"""API keys: their form, their hash, their scopes."""

from __future__ import annotations

import re
import secrets
from enum import StrEnum
from hashlib import sha256

from service.domain.records import tenant_of_key

SECRET_BYTES = 24
_NUMBER_BYTES = 6
_KEY = re.compile(r"dmn_(?P<id>(?:[A-Za-z0-9][A-Za-z0-9._-]{0,63}_)?[0-9a-f]{12})_[0-9a-f]{48}")
BEARER = re.compile(r"(?i:bearer) +([\x21-\x7e]{1,512}) *")


class Scope(StrEnum):
    """What a key allows. An operator's belongs to no tenant and may do everything, for every tenant."""

    CLASSIFY = "classify"
    MEMORY = "memory"
    ADMIN = "admin"
    METRICS = "metrics"
    OPERATOR = "operator"


# Keys -----------------------------------------------------------------------------------------------------------------


def new_key(tenant: str) -> tuple[str, str]:
    """Return a key that nobody has yet, and its id, for a tenant or, with '', for none."""
    number = secrets.token_hex(_NUMBER_BYTES)
    id_ = f"{tenant}_{number}" if tenant else number
    return f"dmn_{id_}_{secrets.token_hex(SECRET_BYTES)}", id_


def id_of(key: str) -> str | None:
    """Return the id of a key, or None of what is no key of ours."""
    found = _KEY.fullmatch(key)
    return None if found is None else found["id"]


def claimed_tenant(authorization: str) -> str:
    """Return whose key an `Authorization` header says that it holds, or ''. Nobody has looked whether it is one."""
    found = BEARER.fullmatch(authorization)
    id_ = None if found is None else id_of(found[1])
    return "" if id_ is None else tenant_of_key(id_)


def hash_of(key: str) -> str:
    """Return what is kept of a key: its SHA-256.

    One round and no salt are right here. A slow hash is there to make guessing what people can remember expensive; a
    key of ours holds 192 random bits, which nobody guesses however fast, and a slow hash would only let callers keep
    the processor busy. Two keys never have the same secret, so a salt would tell nothing apart.
    """
    return sha256(key.encode()).hexdigest()
