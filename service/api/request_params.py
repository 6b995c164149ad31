"""The head of a request, read at one go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Scope

from service.api.schemas.base import Key, TenantName


def headers_of(scope: Scope) -> dict[str, str]:
    """Return a request's headers by their names in lower case; of several with one name the first.

    Starlette's own mapping goes through all headers again for each that is asked for.
    """
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}


M = TypeVar("M", bound=BaseModel)


class CallHeaders(BaseModel):
    """The headers of a call with images, for a route that reads them itself; names are in lower case."""

    model_config = ConfigDict(frozen=True)

    tenant: TenantName | None = Field(None, alias="x-tenant", description="tenant, if not the default one")
    deadline_ms: float | None = Field(
        None, alias="x-deadline-ms", gt=0, lt=1e9, description="milliseconds the answer may take"
    )
    key: Key | None = Field(None, alias="idempotency-key", description="one answer for all retries of a call")


def parsed(model: type[M], place: str, given: Mapping[str, str]) -> M:
    """Return what a call's query or headers say.

    Raises:
        RequestValidationError: as the framework itself would, had it read them.
    """
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": (place, *one["loc"])} for one in error.errors()]) from error


def as_parameters(model: type[BaseModel], place: str) -> list[dict[str, object]]:
    """Return what the OpenAPI document says of such a query, or of such headers."""
    told = []
    for name, schema in model.model_json_schema()["properties"].items():
        said = {key: value for key, value in schema.items() if key not in ("title", "description")}
        told.append(
            {"name": name, "in": place, "required": False, "schema": said, "description": schema["description"]}
        )
    return told
