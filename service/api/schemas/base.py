"""What goes over the wire; nothing behind the porch sees these models."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from core.prompts import PLACEHOLDER
from service.settings import TENANT_NAME

LIMITS = "x-limits"
"""Where a schema names the setting that a bound of its is, until `document.describe` puts its value there."""

REQUIRED: dict[str, Any] = {"x-required": True}
"""Said of a parameter whose absence the route itself refuses, in better words than the framework's."""

_SPACE = r"\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CONTROL = r"\x00-\x1f\x7f-\x9f"
_AROUND = f"[{_SPACE}]*"


def _said(middle: str) -> dict[str, Any]:
    """Return the schema of a text that may have space around it, as `tenants.class_name` and its like take it."""
    inner = f"[^{_CONTROL}]*"
    pattern = f"^{_AROUND}{inner}{middle}{inner}{_AROUND}$"
    counted = "Characters are counted in Unicode's NFC, without the space around."
    bounds = {"minLength": 1, "pattern": pattern, LIMITS: {"maxLength": "max_text_chars"}}
    return {"type": "string", "description": counted, **bounds}


TEXT = _said(f"[^{_CONTROL}{_SPACE}]")
"""Schema of a class name or sentence."""

_TEMPLATE = _said(re.escape(PLACEHOLDER))
_NAME = {"pattern": f"^{TENANT_NAME}$"}
_KEY = {"minLength": 1, "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"}

Text = Annotated[str, Field(json_schema_extra=TEXT)]
Template = Annotated[str, Field(json_schema_extra=_TEMPLATE)]
TenantName = Annotated[str, Field(json_schema_extra=_NAME)]
Key = Annotated[str, Field(json_schema_extra=_KEY)]
"""Texts that are looked at behind the porch: these say in the OpenAPI document what will be refused there."""


def at_most(setting: str, **more: Any) -> dict[str, Any]:
    """Return the schema of a list that has as many items as a setting allows."""
    return {LIMITS: {"maxItems": setting}, **more}


class RequestModel(BaseModel):
    """A request body: strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def as_bytes(self) -> bytes:
        """Return the body as JSON, whatever its text holds: half a surrogate is refused later, and by name."""
        text = json.dumps(self.model_dump(), ensure_ascii=False, separators=(",", ":"))
        return text.encode(errors="surrogatepass")


Moment = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class ResponseModel(BaseModel):
    """A response body."""

    model_config = ConfigDict(frozen=True)


def _whole(value: object) -> object:
    """Return a number without its point where nothing is after it: to JSON 2.0 is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)


class Problem(ResponseModel):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    retry_after: float | None = None


class StampOut(ResponseModel):
    """Where the memory is in its life."""

    version: int
    epoch: int
    state: Literal["fresh", "stale"]
