"""What goes over the wire; nothing behind the porch sees these models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.fusion import DEFAULT_WEIGHTS
from core.prompts import DEFAULT_TEMPLATES
from core.snapshot import DEFAULT_BETA, DEFAULT_SLOTS

from ..tenants import ClassSpec, Retention, TenantConfig


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Out(BaseModel):
    model_config = ConfigDict(frozen=True)


class ImageIn(_In):
    """One image of a JSON call: its bytes in base64."""

    data: str


class ClassifyIn(_In):
    """The JSON body of a call: images in base64."""

    images: list[ImageIn]


class ClassIn(_In):
    """A class: its name and sentences that describe it."""

    name: str
    prompts: list[str] = []

    def spec(self) -> ClassSpec:
        """Return what the service calls a class."""
        return ClassSpec(name=self.name, prompts=tuple(self.prompts))


ClassesIn = list[ClassIn | str]


def specs(classes: ClassesIn) -> tuple[ClassSpec, ...]:
    """Return what the classes of a body stand for."""
    return tuple(ClassSpec(name=one) if isinstance(one, str) else one.spec() for one in classes)


class TenantIn(_In):
    """A tenant's configuration; what is left out has its default."""

    classes: ClassesIn = []
    templates: list[str] = list(DEFAULT_TEMPLATES)
    slots: int = Field(DEFAULT_SLOTS, ge=0, le=2**31)
    beta: float = DEFAULT_BETA
    weights: tuple[float, float, float] = DEFAULT_WEIGHTS
    learn: bool = True
    retention: Retention = "features"

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
        )


class AddClassesIn(_In):
    """Classes to add."""

    classes: Annotated[ClassesIn, Field(min_length=1)]


class ResetIn(_In):
    """Which memories to empty, and of which classes (all, if left out)."""

    scope: Literal["dynamic", "static", "all"]
    classes: list[str] | None = None


class Problem(_Out):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    retry_after: float | None = None


class ClassOut(_Out):
    """A class of a tenant."""

    name: str
    prompts: list[str]


class TenantOut(_Out):
    """A tenant and what it decided for itself."""

    tenant: str
    classes: list[ClassOut]
    templates: list[str]
    slots: int
    beta: float
    weights: tuple[float, float, float]
    learn: bool
    retention: Retention

    @staticmethod
    def of(name: str, config: TenantConfig) -> TenantOut:
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
    """Each branch's own first answer; `static` is null without shots."""

    text: ScoreOut
    dynamic: ScoreOut
    static: ScoreOut | None


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


class MemoryOut(_Out):
    """Both memories of a tenant; `bytes` of features and kept images."""

    tenant: str
    fingerprint: str
    epoch: int
    version: int
    bytes: int
    dynamic: DynamicOut
    static: StaticOut
    projections: dict[str, Any] | None


class ResetOut(_Out):
    """Where the memory is after a reset."""

    tenant: str
    memory: StampOut


class CheckOut(_Out):
    """One reason for being ready or not."""

    ok: bool
    detail: str


class ReadyOut(_Out):
    """Whether traffic may be sent here, and why."""

    ready: bool
    checks: dict[str, CheckOut]


class LiveOut(_Out):
    """The process is alive."""

    live: bool


class VersionOut(_Out):
    """What is running."""

    version: str
    encoder: str
    fingerprint: str
    device: str
    store: str
