"""What goes over the wire; nothing behind the porch sees these models."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from core.adaptive.adaptation import Adaptation
from core.prompts import DEFAULT_TEMPLATES, PLACEHOLDER
from core.readout.fusion import DEFAULT_WEIGHTS
from core.snapshot import DEFAULT_BETA, DEFAULT_SLOTS, Method
from core.training.recipe import DEFAULT_EPOCHS
from service.domain.tenant import ClassSpec, Retention, TenantConfig
from service.settings import TENANT_NAME
from service.stores.protocol import Job, SnapshotInfo, StoredOffsets
from service.tenants.training import Options

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


def _at_most(setting: str, **more: Any) -> dict[str, Any]:
    """Return the schema of a list that has as many items as a setting allows."""
    return {LIMITS: {"maxItems": setting}, **more}


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def as_bytes(self) -> bytes:
        """Return the body as JSON, whatever its text holds: half a surrogate is refused later, and by name."""
        text = json.dumps(self.model_dump(), ensure_ascii=False, separators=(",", ":"))
        return text.encode(errors="surrogatepass")


Moment = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class _Out(BaseModel):
    model_config = ConfigDict(frozen=True)


class ImageIn(_In):
    """One image of a JSON call: its bytes in base64."""

    data: Annotated[str, Field(json_schema_extra={"format": "byte"})]


class ClassifyIn(_In):
    """The JSON body of a call: images in base64."""

    images: list[ImageIn]


class ClassIn(_In):
    """A class: its name and sentences that describe it."""

    name: Text
    prompts: Annotated[list[Text], Field(json_schema_extra=_at_most("max_prompts"))] = []

    def spec(self) -> ClassSpec:
        """Return what the service calls a class."""
        return ClassSpec(name=self.name, prompts=tuple(self.prompts))


ClassesIn = Annotated[list[ClassIn | Text], Field(json_schema_extra=_at_most("max_classes", uniqueItems=True))]

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


def _whole(value: object) -> object:
    """Return a number without its point where nothing is after it: to JSON 2.0 is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TenantIn(_In):
    """A tenant's configuration; what is left out has its default."""

    model_config = ConfigDict(json_schema_extra={"anyOf": _SOME_PROMPT})

    classes: ClassesIn = []
    templates: Annotated[list[Template], Field(json_schema_extra=_at_most("max_prompts"))] = list(DEFAULT_TEMPLATES)
    slots: Annotated[int, Field(ge=0, json_schema_extra={LIMITS: {"maximum": "max_slots"}}), _WHOLE] = DEFAULT_SLOTS
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


class AddClassesIn(_In):
    """Classes to add."""

    classes: Annotated[ClassesIn, Field(min_length=1)]


class ResetIn(_In):
    """Which memories to empty, and of which classes (all, if left out)."""

    scope: Literal["dynamic", "static", "all"]
    classes: list[Text] | None = None


class TrainIn(_In):
    """How to train; what is left out has its default."""

    epochs: Annotated[int, Field(ge=1, le=1000, description="passes over the shots at most"), _WHOLE] = DEFAULT_EPOCHS
    learning_rate: Annotated[
        float | None,
        Field(gt=0, le=1, description="of the first step; by default 1e-4 times 100 over the encoder's logit scale"),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**53, description="of the order, the crops, and what is held out"), _WHOLE] = 0

    def options(self) -> Options:
        """Return what the service calls options."""
        return Options(epochs=self.epochs, learning_rate=self.learning_rate, seed=self.seed)


class Problem(_Out):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    retry_after: float | None = None


class JobOut(_Out):
    """Long work in the background; `progress` from 0 to 1, `eta_s` in seconds, `error` a problem."""

    id: str
    kind: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: float
    eta_s: float | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    @staticmethod
    def of(job: Job) -> JobOut:
        """Return what a caller sees of a job."""
        return JobOut(
            id=job.id,
            kind=job.kind,
            state=job.state.value,
            progress=job.progress,
            eta_s=job.eta_s,
            result=None if job.result is None else dict(job.result),
            error=None if job.error is None else dict(job.error),
        )


class JobListOut(_Out):
    """A page of a tenant's latest jobs, the newest first."""

    items: list[JobOut]
    next: str | None


class SnapshotOut(_Out):
    """A snapshot: when and why it was taken, what it holds, and where the memory was then."""

    id: str
    created: Moment
    reason: str
    fingerprint: str
    epoch: int
    version: int
    classes: int
    slots: int
    shots: int
    bytes: int

    @staticmethod
    def of(info: SnapshotInfo) -> SnapshotOut:
        """Return what a caller sees of a snapshot."""
        return SnapshotOut(
            id=info.id,
            created=datetime.fromtimestamp(info.created, UTC).isoformat(timespec="seconds"),
            reason=info.reason,
            fingerprint=info.fingerprint,
            epoch=info.stamp.epoch,
            version=info.stamp.version,
            classes=info.classes,
            slots=info.slots,
            shots=info.shots,
            bytes=info.bytes,
        )


class SnapshotListOut(_Out):
    """A page of snapshots, the newest first."""

    items: list[SnapshotOut]
    next: str | None


class ClassOut(_Out):
    """A class of a tenant."""

    name: str
    prompts: list[str]


class TenantOut(_Out):
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


class TenantNameOut(_Out):
    """A tenant of a list."""

    tenant: str


class TenantsOut(_Out):
    """A page of tenants."""

    items: list[TenantNameOut]
    next: str | None


class ScoreOut(_Out):
    """A class and its probability."""

    label: str
    score: float


class ReadoutsOut(_Out):
    """Each branch's own first answer; `static` is null without shots, `statistics` with the method `dmn`."""

    text: ScoreOut
    dynamic: ScoreOut
    static: ScoreOut | None
    statistics: ScoreOut | None


class LearnedOut(_Out):
    """What the image did to the dynamic memory; entropy in nats."""

    outcome: Literal["filled", "replaced", "rejected", "duplicate", "skipped", "pending"]
    label: str
    entropy: float
    slot: str | None
    evicted: str | None


class SlotTraceOut(_Out):
    """A dynamic slot that spoke for the answer."""

    label: str
    slot: str
    affinity: float
    entropy: float


class ShotTraceOut(_Out):
    """A shot that spoke for the answer."""

    label: str
    shot: str
    affinity: float


class ExplainOut(_Out):
    """The three strongest slots and shots behind an answer."""

    dynamic: list[SlotTraceOut]
    static: list[ShotTraceOut]


class PredictionOut(_Out):
    """One image's answer, or its problem and nulls."""

    label: str | None
    score: float | None
    top: list[ScoreOut] | None
    readouts: ReadoutsOut | None
    learned: LearnedOut | None
    explain: ExplainOut | None
    error: Problem | None


class StampOut(_Out):
    """Where the memory is in its life."""

    version: int
    epoch: int
    state: Literal["fresh", "stale"]


class ClassifyOut(_Out):
    """Answers, in the order of the images."""

    tenant: str
    model: str
    predictions: list[PredictionOut]
    memory: StampOut


class ShotOut(_Out):
    """One uploaded shot: its id, or its problem."""

    id: str | None
    label: str
    error: Problem | None


class ShotsOut(_Out):
    """What became of uploaded shots, in order."""

    shots: list[ShotOut]
    memory: StampOut


class ShotItemOut(_Out):
    """A stored shot of a list."""

    id: str
    label: str


class ShotListOut(_Out):
    """A page of shots."""

    items: list[ShotItemOut]
    next: str | None


class SlotItemOut(_Out):
    """A dynamic slot of a list; entropy in nats."""

    slot: str
    entropy: float


class SlotListOut(_Out):
    """A page of a class's slots, the surest first."""

    items: list[SlotItemOut]
    next: str | None


class DynamicClassOut(_Out):
    """A class's bank: how many slots are filled, and their entropies in nats, ascending."""

    label: str
    count: int
    entropies: list[float]


class DynamicOut(_Out):
    """The dynamic memory."""

    slots: int
    classes: list[DynamicClassOut]


class StaticClassOut(_Out):
    """A class's shots."""

    label: str
    count: int


class StaticOut(_Out):
    """The static memory."""

    classes: list[StaticClassOut]


class HeldOutOut(_Out):
    """Accuracy on held-out shots by branch, in percent, without and with the offsets."""

    before: dict[str, float]
    after: dict[str, float]


class ProjectionsOut(_Out):
    """Trained offsets: when, by how many passes over how many shots, and how many classes have a row."""

    id: str
    trained: Moment
    epochs: int
    shots: int
    held_out: HeldOutOut | None
    classes: int

    @staticmethod
    def of(offsets: StoredOffsets) -> ProjectionsOut | None:
        """Return what a caller sees of trained offsets; None if there are none."""
        known = offsets.training
        if known is None:
            return None
        held_out = None
        if known.before is not None and known.after is not None:
            held_out = HeldOutOut(before=dict(known.before), after=dict(known.after))
        return ProjectionsOut(
            id=known.id,
            trained=datetime.fromtimestamp(known.created, UTC).isoformat(timespec="seconds"),
            epochs=known.epochs,
            shots=known.shots,
            held_out=held_out,
            classes=len(offsets.rows),
        )


class AdaptationOut(_Out):
    """How far the method `auto` trusts what it has.

    `images` were counted in class statistics; the weights are those of the shots' and the statistics' scores beside the
    text head's; `held_out` shots the shots' weight and the `sharpness` were measured on (0: none could be left out).
    """

    images: int
    shots_weight: float
    statistics_weight: float
    sharpness: float
    held_out: int
    temperature: float

    @staticmethod
    def of(adaptation: Adaptation) -> AdaptationOut:
        """Return what a caller sees of it."""
        frozen, read = adaptation.frozen, adaptation.directions
        return AdaptationOut(
            images=adaptation.images,
            shots_weight=frozen.weight,
            statistics_weight=read.weight,
            sharpness=frozen.sharpness,
            held_out=frozen.held_out,
            temperature=math.exp(read.temperature),
        )


class MemoryOut(_Out):
    """Both memories of a tenant; `bytes` of features, kept images and offsets; `adaptation` is that of `auto`."""

    tenant: str
    fingerprint: str
    epoch: int
    version: int
    bytes: int
    dynamic: DynamicOut
    static: StaticOut
    projections: ProjectionsOut | None
    adaptation: AdaptationOut | None


class ResetOut(_Out):
    """Where the memory is after a reset, a restore or an import; `snapshot` keeps what it was before."""

    tenant: str
    memory: StampOut
    snapshot: SnapshotOut | None


class HoldingOut(_Out):
    """How much a memory holds."""

    slots: int
    shots: int


class MigrateIn(_In):
    """How to switch: with `force` also if shots are lost by it, whose images are not kept."""

    force: bool = False


class MigrationOut(_Out):
    """Where a tenant is on its way to the next encoder.

    `encoder` is its own, `next` the one that it may be switched to, if there is one; `shadow` is the memory that its
    traffic has filled under that. `stranded` shots have no kept image, and trained offsets cannot come along either.
    """

    tenant: str
    encoder: str
    next: str | None
    memory: HoldingOut
    shadow: HoldingOut | None
    stranded: int
    trained: bool


class CheckOut(_Out):
    """One reason for being ready or not."""

    ok: bool
    detail: str


class ReadyOut(_Out):
    """Whether traffic may be sent here, and why."""

    ready: bool
    checks: dict[str, CheckOut]


class LiveOut(_Out):
    """Whether the process is alive, and why."""

    live: bool
    checks: dict[str, CheckOut]


class VersionOut(_Out):
    """What is running."""

    version: str
    encoder: str
    fingerprint: str
    device: str
    store: str
