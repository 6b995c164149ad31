"""The response of `/classify`: predictions, scores, explanations and the `Server-Timing` header."""

from __future__ import annotations

from typing import Any

from fastapi import Response

from service.access.idempotency import Ledger
from service.api.problems import AllFailed, problem_of
from service.api.responses import is_final, json_answer, response_of, stamp_told
from service.api.schemas.classify import PredictionOut
from service.classify import ClassifyCall, Fault
from service.domain.records import Remembered
from service.inference.results import Choice, Explanation, Reading
from service.services import Rooms
from service.telemetry.metrics import STAGES
from service.tenants import encoder_routing


async def answered(rooms: Rooms, ledger: Ledger, call: ClassifyCall, key: str | None, digest: str) -> Response:
    """Return the answer to a call: the one kept for its key, or what the rooms make of it.

    Raises:
        ServiceError, AllFailed: the call is refused, or no image of it could be answered.
    """
    headers: dict[str, str] = {}

    async def once() -> Remembered:
        own, results = await encoder_routing.classify(rooms, call)
        readings = [result for result in results if isinstance(result, Reading)]
        if not readings:
            raise AllFailed([result for result in results if not isinstance(result, Reading)])
        headers.update({"Server-Timing": _server_timing(readings), **rooms.quotas.headers(call.tenant)})
        latest = max(reading.stamp for reading in readings)
        told = {
            "tenant": call.tenant,
            "model": own.encoder.name,
            "predictions": [_told(result) for result in results],
            "memory": stamp_told(latest, stale=any(reading.stale for reading in readings)),
        }
        return json_answer(told, digest, final=is_final(results))

    return response_of(await ledger.once(call.tenant, key, digest, once, wait_s=call.deadline - rooms.clock()), headers)


# What `ClassifyOut` says, without its models: making and checking these takes longer than telling what they hold.


def _told(result: Reading | Fault) -> dict[str, Any]:
    if isinstance(result, Reading):
        return _prediction(result)
    return {**dict.fromkeys(PredictionOut.model_fields), "error": problem_of(result).model_dump()}


def _prediction(reading: Reading) -> dict[str, Any]:
    learned = reading.learned
    return {
        "label": reading.fused.label,
        "score": reading.fused.score,
        "top": [_score(one) for one in reading.top],
        "readouts": {
            "text": _score(reading.text),
            "dynamic": _score(reading.dynamic),
            "static": reading.static and _score(reading.static),
            "statistics": reading.statistics and _score(reading.statistics),
        },
        "learned": {
            "outcome": learned.outcome,
            "label": learned.label,
            "entropy": learned.entropy,
            "slot": learned.slot,
            "evicted": learned.evicted,
        },
        "explain": reading.explanation and _explained(reading.explanation),
        "error": None,
    }


def _score(choice: Choice) -> dict[str, Any]:
    return {"label": choice.label, "score": choice.score}


def _explained(explanation: Explanation) -> dict[str, Any]:
    return {
        "dynamic": [
            {"label": one.label, "slot": one.id, "affinity": one.affinity, "entropy": one.entropy or 0.0}
            for one in explanation.dynamic
        ],
        "static": [{"label": one.label, "shot": one.id, "affinity": one.affinity} for one in explanation.static],
    }


def _server_timing(readings: list[Reading]) -> str:
    """Return each stage's longest time among the images, in milliseconds."""
    longest = dict.fromkeys(STAGES, 0.0)
    for reading in readings:
        own = dict.fromkeys(STAGES, 0.0)
        for stage, seconds, _ in reading.laps:
            own[stage] += seconds
            longest[stage] = max(longest[stage], own[stage])
    return ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in longest.items())
