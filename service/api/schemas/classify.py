"""Models of `/classify`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Problem, RequestModel, ResponseModel, StampOut


class ImageIn(RequestModel):
    """One image of a JSON call: its bytes in base64."""

    data: Annotated[str, Field(json_schema_extra={"format": "byte"})]


class ClassifyIn(RequestModel):
    """The JSON body of a call: images in base64."""

    images: list[ImageIn]


class ScoreOut(ResponseModel):
    """A class and its probability."""

    label: str
    score: float


class ReadoutsOut(ResponseModel):
    """Each branch's own first answer; `static` is null without shots, `statistics` with the method `dmn`."""

    text: ScoreOut
    dynamic: ScoreOut
    static: ScoreOut | None
    statistics: ScoreOut | None


class LearnedOut(ResponseModel):
    """What the image did to the dynamic memory; entropy in nats."""

    outcome: Literal["filled", "replaced", "rejected", "duplicate", "skipped", "pending"]
    label: str
    entropy: float
    slot: str | None
    evicted: str | None


class SlotTraceOut(ResponseModel):
    """A dynamic slot that spoke for the answer."""

    label: str
    slot: str
    affinity: float
    entropy: float


class ShotTraceOut(ResponseModel):
    """A shot that spoke for the answer."""

    label: str
    shot: str
    affinity: float


class ExplainOut(ResponseModel):
    """The three strongest slots and shots behind an answer."""

    dynamic: list[SlotTraceOut]
    static: list[ShotTraceOut]


class PredictionOut(ResponseModel):
    """One image's answer, or its problem and nulls."""

    label: str | None
    score: float | None
    top: list[ScoreOut] | None
    readouts: ReadoutsOut | None
    learned: LearnedOut | None
    explain: ExplainOut | None
    error: Problem | None


class ClassifyOut(ResponseModel):
    """Answers, in the order of the images."""

    tenant: str
    model: str
    predictions: list[PredictionOut]
    memory: StampOut
