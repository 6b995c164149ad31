"""Whatever is done to a call, the answer is no fault of ours; `tests/soak/test_mutations.py` asks over sockets."""

from __future__ import annotations

import json

import pytest

from tests.support.house import House
from tests.support.mutants import CLASSES, KINDS, SMALL, TENANT, fault, mutant

COUNT = 100


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in {"path", "wire"}])
async def test_no_mutant_is_a_fault_of_ours(house: House, kind: str) -> None:
    assert (await house.put(TENANT)).status_code == 201
    for number in range(COUNT):
        own = mutant(0, number, (kind,))
        answer = await house.client.request(own.method, own.target, headers=own.headers, content=own.body)
        wrong = fault(answer.status_code, answer.headers.get("content-type", ""), answer.content)
        assert not wrong, (number, own)
        if answer.status_code >= 400:
            assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert (await house.put(TENANT)).status_code == 200
    (one,) = await house.predictions(SMALL, tenant=TENANT)
    assert one["label"] in CLASSES


async def test_whatever_configuration_is_taken_images_are_answered_with_it(house: House) -> None:
    taken = 0
    for number in range(3 * COUNT):
        own = mutant(1, number, ("json",))
        answer = await house.client.request(own.method, own.target, headers=own.headers, content=own.body)
        if own.method == "PUT" and answer.status_code < 300 and answer.json()["classes"]:
            (one,) = await house.predictions(SMALL, tenant=TENANT)
            assert isinstance(one["score"], float), own.body
            taken += 1
    assert taken > 10


async def test_a_mutant_is_made_again_from_its_seed_and_number() -> None:
    assert [mutant(3, number) for number in range(50)] == [mutant(3, number) for number in range(50)]
    assert mutant(3, 0) != mutant(4, 0)


@pytest.mark.parametrize(
    ("status", "content_type", "told", "wrong"),
    [
        (200, "application/json", {}, ""),
        (503, "application/problem+json", {"type": "/problems/queue-full", "status": 503, "detail": "Full."}, ""),
        (400, "application/problem+json", {"type": "about:blank", "status": 400, "detail": "No HTTP."}, ""),
        (500, "application/problem+json", {"type": "/problems/internal", "status": 500, "detail": "Oh."}, "500"),
        (504, "application/problem+json", {"type": "/problems/x", "status": 504, "detail": "Late."}, "504"),
        (200, "application/json", {"error": {"type": "/problems/internal"}}, "failed by a fault"),
        (404, "text/plain", {}, "not as a problem"),
        (
            404,
            "application/problem+json",
            {"type": "/problems/new", "status": 404, "detail": "No."},
            "refused with 404",
        ),
        (404, "application/problem+json", {"type": "about:blank", "status": 404, "detail": "No."}, "refused with 404"),
        (422, "application/problem+json", {"type": "/problems/not-found", "status": 422, "detail": "A."}, "refused"),
    ],
)
def test_a_fault_is_seen(status: int, content_type: str, told: dict[str, object], wrong: str) -> None:
    found = fault(status, content_type, json.dumps(told, separators=(",", ":")).encode())
    assert wrong in found
    assert bool(found) == bool(wrong)
