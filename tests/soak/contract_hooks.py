"""What schemathesis is taught of this service (`test_contract.py`): what bodies are, and what no schema can say.

It is loaded by schemathesis itself, as `SCHEMATHESIS_HOOKS` says.
"""

from __future__ import annotations

import base64
import json
import os
import unicodedata
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, HookContext, Response
from schemathesis.core.failures import AcceptedNegativeData, Failure
from schemathesis.openapi.checks import AllowHeaderMismatch, RejectedPositiveData

from tests.soak.test_contract import MEMORY, OWN_TENANT, TENANT, TEXT_CHARS
from tests.support.fakes import COLOURS, picture

OWN = os.environ[OWN_TENANT]


def _zipped(colour: str, seed: int) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{colour}/1.png"), picture(colour, seed))
    return file.getvalue()


# What bodies are ------------------------------------------------------------------------------------------------------

# The document says that an image is bytes, and nothing can be drawn from that which is an image.
COLOUR = st.sampled_from(list(COLOURS))
PICTURES = st.builds(picture, COLOUR, st.integers(0, 20), form=st.sampled_from(["PNG", "JPEG", "WEBP"]))
schemathesis.openapi.format("binary", PICTURES)
schemathesis.openapi.format("byte", PICTURES.map(lambda image: base64.b64encode(image).decode()))
schemathesis.openapi.media_type("image/*", PICTURES)
schemathesis.openapi.media_type("application/zip", st.builds(_zipped, COLOUR, st.integers(0, 20)))
schemathesis.openapi.media_type("application/octet-stream", st.just(Path(os.environ[MEMORY]).read_bytes()))


# What no schema can say -----------------------------------------------------------------------------------------------

REFUSED: Mapping[tuple[str, str], str] = {
    ("duplicate-class", ""): "names are compared with those that the tenant has, and after they were tidied",
    ("limit-exceeded", "classes were given"): "those that are added are counted with those that are there",
    ("limit-exceeded", "no room for a snapshot"): "what is there counts too",
    ("limit-exceeded", "tenants; no more are allowed"): "the same",
    ("limit-exceeded", "The tenant would hold"): "the same",
    ("limit-exceeded", "would have"): "the same, of shots",
    ("invalid-request", "The cursor is not one"): "a cursor is what the service gave, and nothing tells which it gave",
    ("invalid-request", "The item of this cursor is gone"): "the same, of an item that is no more",
    ("invalid-request", "Training needs shots"): "which shots the tenant has is no matter of the request",
    ("invalid-request", "have no shot, and training"): "the same",
    ("invalid-request", "would drown the smaller one"): "the same",
}
"""Why a request that fits the document may be refused: by the problem's type, and what its detail has in it."""

SLOT = "/memory/dynamic/{name}/{slot}"
"""A class may have a slash in its name, so that a slot's path is also that of a class, which takes another method."""


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:  # noqa: ARG001 - as it is called
    """Have a call name a tenant that is there, whose caller it is, and give it an idempotency key of its own.

    No schema says which tenants there are, that two parameters agree, or what was said before. A call that is to be
    refused stays as it is.
    """
    if case.meta is None or case.meta.generation.mode.is_negative:
        return
    sent = {name.lower(): name for name in case.headers or ()}
    if "x-tenant" in sent:
        case.headers[sent["x-tenant"]] = OWN
    if "tenant" in (case.query or {}):
        case.query["tenant"] = OWN
    if "tenant" in (case.path_parameters or {}) and OWN == TENANT:
        case.path_parameters["tenant"] = OWN  # others are made and removed by those who may
    if "idempotency-key" in sent:
        case.headers[sent["idempotency-key"]] = str(uuid.uuid4())


@schemathesis.hook
def filter_failure(context: HookContext, failure: Failure, case: Case, response: Response) -> bool:  # noqa: ARG001
    """Return whether a failure is one."""
    if isinstance(failure, AllowHeaderMismatch):
        return case.operation.path != SLOT
    if isinstance(failure, AcceptedNegativeData) and "larger than maxLength" in failure.message:
        # Characters are counted after a text was tidied, as the document says in words: no schema can.
        return any(len(unicodedata.normalize("NFC", text).strip()) > TEXT_CHARS for text in _texts(case.body))
    told = _problem(response)
    slug, detail = told.get("type", "").rpartition("/")[2], told.get("detail", "")
    if slug == "deadline-exceeded":
        # Whoever allows a millionth of a millisecond is answered too late, as asked; anybody else should not be.
        return "x-deadline-ms" not in {name.lower() for name in case.headers or ()}
    return not (
        isinstance(failure, RejectedPositiveData) and any(slug == one and part in detail for one, part in REFUSED)
    )


def _texts(value: object) -> Iterator[str]:
    """Yield every text of a body."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _problem(response: Response) -> dict[str, Any]:
    """Return the problem that an answer tells of, or nothing."""
    if response.headers.get("content-type") != ["application/problem+json"]:
        return {}
    return dict(json.loads(response.content))
