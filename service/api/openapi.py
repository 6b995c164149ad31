"""What the OpenAPI document says beyond what the framework reads off routes and models.

Routes name the problems of their own (`problems.may`); those that any route of a kind may answer with are added here.
Limits that the operator sets stand in the models by the name of their setting (`schemas.LIMITS`), and get its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from service.access.api_keys import Scope
from service.api.schemas.base import LIMITS, REQUIRED, Problem
from service.problem_types import PROBLEMS
from service.settings import Settings

from .problems import MAY, MEDIA_TYPE
from .security import NEEDS

Json = dict[str, Any]

_SCHEME = "key"
_PROBLEM = "#/components/schemas/Problem"
_UPLOADS = frozenset(("multipart/form-data", "application/octet-stream"))
"""Kinds of bodies whose routes look at the content type; where there is JSON alone, anything is read as JSON."""

_WAIT = {"description": "Seconds to wait before the next try.", "schema": {"type": "integer", "minimum": 1}}
_ID = {
    "description": "Names the request in logs and traces.",
    "required": True,
    "schema": {"type": "string", "minLength": 1, "maxLength": 128},
}
_HEADERS: Mapping[int, Json] = {
    HTTPStatus.UNAUTHORIZED: {
        "WWW-Authenticate": {
            "description": "How to show a key.",
            "required": True,
            "schema": {"type": "string", "const": "Bearer"},
        }
    },
    HTTPStatus.METHOD_NOT_ALLOWED: {
        "Allow": {"description": "The methods that the path takes.", "required": True, "schema": {"type": "string"}}
    },
    HTTPStatus.TOO_MANY_REQUESTS: {"Retry-After": {**_WAIT, "required": True}},
    HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": _WAIT},
}


def describe(app: FastAPI, settings: Settings) -> None:
    """Have an application's OpenAPI document say what may be sent, who may send it, and every answer that may come."""
    plain = app.openapi

    def described() -> Json:
        if app.openapi_schema is None:
            _complete(plain(), settings)
        return plain()

    app.openapi = described  # type: ignore[method-assign]


def _complete(told: Json, settings: Settings) -> None:
    keys = settings.auth == "keys"
    needs = {path.replace(":path}", "}"): scope for path, scope in NEEDS.items()}
    components = told.setdefault("components", {})
    components["securitySchemes"] = {
        _SCHEME: {"type": "http", "scheme": "bearer", "description": "An API key; `dmn keys` makes them."}
    }
    components["headers"] = {"X-Request-ID": _ID}
    components["schemas"]["Problem"] = Problem.model_json_schema()
    for path, item in told["paths"].items():
        for method, own in item.items():
            scope = needs[path]
            if keys and scope is not None:
                own["security"] = [{_SCHEME: [scope.value]}]
            for one in own.get("parameters", ()):
                one["schema"] = _never_null(one["schema"])
                one["required"] = one["schema"].pop(*REQUIRED, one["required"])
            _add_problems(own, _of_any(path, method, own, scope, keys=keys))
            for answer in own["responses"].values():
                answer.setdefault("headers", {})["X-Request-ID"] = {"$ref": "#/components/headers/X-Request-ID"}
    for node in _objects(told):
        for word, setting in node.pop(LIMITS, {}).items():
            node[word] = getattr(settings, setting)


def _of_any(path: str, method: str, own: Json, scope: Scope | None, *, keys: bool) -> Iterator[str]:
    """Yield the problems that any operation of this kind may answer with."""
    asked = {one["name"].lower() for one in own.get("parameters", ())}
    bodies = own.get("requestBody", {}).get("content", {}).keys()
    holds: Mapping[tuple[str, ...], object] = {
        ("internal", "deadline-exceeded"): True,
        ("unauthenticated",): scope is not None and keys,
        ("forbidden", "store-down"): scope is not None,  # without keys a web page of another site is refused
        ("invalid-request",): scope is not None and (asked or bodies),
        ("unknown-tenant", "fingerprint-mismatch"): "x-tenant" in asked or "{tenant}" in path,
        ("not-found",): "{" in path,
        ("method-not-allowed",): path.endswith("{slot}"),  # without a slot it is the path of a class
        ("idempotency-conflict",): "idempotency-key" in asked,
        ("body-too-large", "queue-full"): bodies,
        ("unsupported-media-type",): _UPLOADS & bodies,
        ("limit-exceeded",): scope is not None and method != "get",  # a snapshot may need room
    }
    for slugs, does in holds.items():
        yield from slugs if does else ()


def _add_problems(own: Json, more: Iterator[str]) -> None:
    """Document problems: those that the route names, and more, by status."""
    answers = own["responses"]
    slugs = {slug for answer in answers.values() for slug in answer.pop(MAY, ())} | set(more)
    answers.pop(str(HTTPStatus.UNPROCESSABLE_ENTITY.value), None)  # the framework's place for its own
    for status in sorted({PROBLEMS[slug].status for slug in slugs}):
        of_it = sorted(slug for slug in slugs if PROBLEMS[slug].status == status)
        answer = answers.setdefault(str(status), {})
        answer["description"] = " ".join(f"{PROBLEMS[slug].title} (`{slug}`)." for slug in of_it)
        answer.setdefault("content", {})[MEDIA_TYPE] = {"schema": _problem_schema(status, of_it)}
        answer.setdefault("headers", {}).update(_HEADERS.get(status, {}))


def _problem_schema(status: int, slugs: list[str]) -> Json:
    types = [f"/problems/{slug}" for slug in slugs]
    fixed = {"type": {"enum": types}, "status": {"const": status}}
    return {"allOf": [{"$ref": _PROBLEM}, {"type": "object", "properties": fixed}]}


def _never_null(schema: Json) -> Json:
    """Return what is said of a parameter without null: it is left out, or is a text that cannot be null."""
    either = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    if len(either) != 1:
        return schema
    return {**{key: value for key, value in schema.items() if key != "anyOf"}, **either[0]}


def _objects(node: object) -> Iterator[Json]:
    """Yield every object of a document."""
    if isinstance(node, dict):
        yield node
    if isinstance(node, dict | list):
        for inner in list(node.values()) if isinstance(node, dict) else node:
            yield from _objects(inner)
