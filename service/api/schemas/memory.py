"""Models of the memory routes: shots, slots, training, adaptation."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated

from pydantic import Field

from core.adaptive.adaptation import Adaptation
from core.training.recipe import DEFAULT_EPOCHS
from service.domain.memory import StoredOffsets
from service.tenants.training import Options

from .base import WHOLE, Moment, Problem, RequestModel, ResponseModel, StampOut


class TrainIn(RequestModel):
    """How to train; what is left out has its default."""

    epochs: Annotated[int, Field(ge=1, le=1000, description="passes over the shots at most"), WHOLE] = DEFAULT_EPOCHS
    learning_rate: Annotated[
        float | None,
        Field(gt=0, le=1, description="of the first step; by default 1e-4 times 100 over the encoder's logit scale"),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**53, description="of the order, the crops, and what is held out"), WHOLE] = 0

    def options(self) -> Options:
        """Return what the service calls options."""
        return Options(epochs=self.epochs, learning_rate=self.learning_rate, seed=self.seed)


class ShotOut(ResponseModel):
    """One uploaded shot: its id, or its problem."""

    id: str | None
    label: str
    error: Problem | None


class ShotsOut(ResponseModel):
    """What became of uploaded shots, in order."""

    shots: list[ShotOut]
    memory: StampOut


class ShotItemOut(ResponseModel):
    """A stored shot of a list."""

    id: str
    label: str


class ShotListOut(ResponseModel):
    """A page of shots."""

    items: list[ShotItemOut]
    next: str | None


class SlotItemOut(ResponseModel):
    """A dynamic slot of a list; entropy in nats."""

    slot: str
    entropy: float


class SlotListOut(ResponseModel):
    """A page of a class's slots, the surest first."""

    items: list[SlotItemOut]
    next: str | None


class DynamicClassOut(ResponseModel):
    """A class's bank: how many slots are filled, and their entropies in nats, ascending."""

    label: str
    count: int
    entropies: list[float]


class DynamicOut(ResponseModel):
    """The dynamic memory."""

    slots: int
    classes: list[DynamicClassOut]


class StaticClassOut(ResponseModel):
    """A class's shots."""

    label: str
    count: int


class StaticOut(ResponseModel):
    """The static memory."""

    classes: list[StaticClassOut]


class HeldOutOut(ResponseModel):
    """Accuracy on held-out shots by branch, in percent, without and with the offsets."""

    before: dict[str, float]
    after: dict[str, float]


class ProjectionsOut(ResponseModel):
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


class AdaptationOut(ResponseModel):
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


class MemoryOut(ResponseModel):
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
