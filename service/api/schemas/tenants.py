"""Models of the tenant routes: classes, weights, configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, JsonValue

from core.prompts import DEFAULT_TEMPLATES
from core.readout.fusion import DEFAULT_WEIGHTS
from core.snapshot import DEFAULT_BETA, DEFAULT_SLOTS, Method
from service.domain.records import Job
from service.domain.tenant import ClassSpec, Retention, TenantConfig

from .base import LIMITS, WHOLE, RequestModel, ResponseModel, Template, Text, at_most
from .jobs import JobOut


class ClassIn(RequestModel):
    """A class: its name and sentences that describe it."""

    name: Text
    prompts: Annotated[list[Text], Field(json_schema_extra=at_most("max_prompts"))] = []

    def spec(self) -> ClassSpec:
        """Return what the service calls a class."""
        return ClassSpec(name=self.name, prompts=tuple(self.prompts))


ClassesIn = Annotated[list[ClassIn | Text], Field(json_schema_extra=at_most("max_classes", uniqueItems=True))]

_SOME_PROMPT: list[JsonValue] = [
    {"properties": {"templates": {"minItems": 1}}},
    {
        "properties": {
            "classes": {
                "items": {"type": "object", "properties": {"prompts": {"minItems": 1}}, "required": ["prompts"]}
            }
        },
        "required": ["templates"],
    },
]
"""Every class needs a prompt: of the templates, or of its own."""


def specs(classes: ClassesIn) -> tuple[ClassSpec, ...]:
    """Return what the classes of a body stand for."""
    return tuple(ClassSpec(name=one) if isinstance(one, str) else one.spec() for one in classes)


_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TenantIn(RequestModel):
    """A tenant's configuration; what is left out has its default."""

    model_config = ConfigDict(json_schema_extra={"anyOf": _SOME_PROMPT})

    classes: ClassesIn = []
    templates: Annotated[list[Template], Field(json_schema_extra=at_most("max_prompts"))] = list(DEFAULT_TEMPLATES)
    slots: Annotated[int, Field(ge=0, json_schema_extra={LIMITS: {"maximum": "max_slots"}}), WHOLE] = DEFAULT_SLOTS
    beta: float = Field(DEFAULT_BETA, ge=0, allow_inf_nan=False)
    weights: Annotated[
        tuple[_Weight, _Weight, _Weight],
        Field(strict=False, json_schema_extra={"contains": {"type": "number", "exclusiveMinimum": 0}}),
    ] = DEFAULT_WEIGHTS
    learn: bool = True
    retention: Retention = "features"
    method: Method = "auto"

    def config(self) -> TenantConfig:
        """Return what the service calls a configuration."""
        return TenantConfig(
            classes=specs(self.classes),
            templates=tuple(self.templates),
            slots=self.slots,
            beta=self.beta,
            weights=self.weights,
            learn=self.learn,
            retention=self.retention,
            method=self.method,
        )


class AddClassesIn(RequestModel):
    """Classes to add."""

    classes: Annotated[ClassesIn, Field(min_length=1)]


class ClassOut(ResponseModel):
    """A class of a tenant."""

    name: str
    prompts: list[str]


class TenantOut(ResponseModel):
    """A tenant and what it decided for itself; `job` does what its memory still needs after a change."""

    tenant: str
    classes: list[ClassOut]
    templates: list[str]
    slots: int
    beta: float
    weights: tuple[float, float, float]
    learn: bool
    retention: Retention
    method: Method
    job: JobOut | None = Field(None, exclude_if=lambda job: job is None)

    @staticmethod
    def of(name: str, config: TenantConfig, job: Job | None = None) -> TenantOut:
        """Return what a caller is shown of a tenant."""
        return TenantOut(
            tenant=name,
            classes=[ClassOut(name=spec.name, prompts=list(spec.prompts)) for spec in config.classes],
            templates=list(config.templates),
            slots=config.slots,
            beta=config.beta,
            weights=config.weights,
            learn=config.learn,
            retention=config.retention,
            method=config.method,
            job=None if job is None else JobOut.of(job),
        )


class TenantNameOut(ResponseModel):
    """A tenant of a list."""

    tenant: str


class TenantsOut(ResponseModel):
    """A page of tenants."""

    items: list[TenantNameOut]
    next: str | None
