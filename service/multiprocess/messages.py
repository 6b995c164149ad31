"""Messages between HTTP processes and worker processes, as JSON fields."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.types import Scope

from core.encoders.protocol import Preprocess
from service.classify import ClassifyCall
from service.domain.records import StoredKey
from service.errors import StoreDown
from service.telemetry import logs


def preprocess_of(told: dict[str, Any]) -> Preprocess:
    """Return the preprocessing that a worker's first message names."""
    return Preprocess(**told | {"mean": tuple(told["mean"]), "std": tuple(told["std"])})


def key_fields(found: StoredKey | StoreDown | None) -> dict[str, Any] | None:
    """Return what was found out about a key as it is sent; `_found` reads it."""
    if isinstance(found, StoreDown):
        return {"fault": found.detail, "retry_after_s": found.retry_after_s}
    return None if found is None else asdict(found)


def found_key(told: dict[str, Any] | None) -> StoredKey | StoreDown | None:
    """Return the API key of a reply, the fault of the store, or None."""
    if told is None:
        return None
    if "fault" in told:
        return StoreDown(told["fault"], retry_after_s=told["retry_after_s"])
    return StoredKey(**{**told, "scopes": tuple(told["scopes"])})


def call_fields(call: ClassifyCall, key: str | None, digest: str) -> dict[str, Any]:
    """Return a call as it is sent, without its images."""
    return {
        "tenant": call.tenant,
        "images": len(call.images),
        "learn": call.learn,
        "views": call.views,
        "explain": call.explain,
        "top_k": call.top_k,
        "key": key,
        "digest": digest,
        "request_id": logs.request_id.get(),
        "traceparent": logs.traceparent.get(),
    }


def scope_fields(scope: Scope) -> dict[str, Any]:
    """Return what makes a request, as it is sent."""
    same = {name: scope[name] for name in ("http_version", "method", "scheme", "path", "client", "server")}
    return same | {
        "root_path": scope.get("root_path", ""),
        "raw_path": scope["raw_path"].decode("latin-1"),
        "query_string": scope["query_string"].decode("latin-1"),
        "headers": [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]],
    }
