"""Probes, documents and metrics: they tell the truth, and no caller can make them grow."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.errors import StoreDown
from tests.support.fakes import picture
from tests.support.house import Build, House, Json, problem

NAMES = {
    "dmn_requests": "counter",
    "dmn_rejected": "counter",
    "dmn_image_errors": "counter",
    "dmn_predictions": "counter",
    "dmn_memory_updates": "counter",
    "dmn_memory_repairs": "counter",
    "dmn_hot_evictions": "counter",
    "dmn_store_errors": "counter",
    "dmn_request_duration_seconds": "histogram",
    "dmn_stage_duration_seconds": "histogram",
    "dmn_batch_images": "histogram",
    "dmn_memory_entropy_nats": "histogram",
    "dmn_store_duration_seconds": "histogram",
    "dmn_sync_lag_seconds": "histogram",
    "dmn_queue_images": "gauge",
    "dmn_inflight_images": "gauge",
    "dmn_memory_fill_ratio": "gauge",
    "dmn_hot_tenants": "gauge",
    "dmn_hot_bytes": "gauge",
    "dmn_jobs": "gauge",
    "dmn_device_memory_bytes": "gauge",
    "dmn_build_info": "gauge",
}
STAGES = ("decode", "queue", "encode", "memory", "store")


# Probes and documents -------------------------------------------------------------------------------------------------


async def test_the_version_says_what_runs(house: House) -> None:
    assert (await house.client.get("/version")).json() == {
        "version": version("dmn-clip-service"),
        "encoder": "fake",
        "fingerprint": "fake-1",
        "device": "cpu",
        "store": "memory",
    }
    assert (await house.memory())["fingerprint"] == "fake-1"


async def test_a_store_that_is_down_makes_the_server_unready_and_not_dead(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def down(*_: object, **__: object) -> None:
        raise StoreDown("The store does not answer.", retry_after_s=2.0)

    monkeypatch.setattr(house.rooms.store, "ping", down)
    monkeypatch.setattr(house.rooms.store, "load", down)
    assert (await house.client.get("/livez")).status_code == 200
    ready = await house.client.get("/readyz")
    assert (ready.status_code, ready.json()["ready"], ready.json()["checks"]["store"]["ok"]) == (503, False, False)
    answer = await house.client.get("/memory")
    problem(answer, "store-down")
    assert answer.headers["retry-after"] == "2"


async def test_the_documents_answer(house: House) -> None:
    answer = await house.client.get("/docs")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert (await house.client.get("/openapi.json")).headers["content-type"] == "application/json"


def _every(node: Any, key: str) -> Iterator[Any]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from _every(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from _every(value, key)


async def _openapi(house: House) -> Json:
    return dict((await house.client.get("/openapi.json")).json())


async def test_every_route_is_documented(house: House) -> None:
    told = await _openapi(house)
    assert told["openapi"].startswith("3.1")
    for item in told["paths"].values():
        for operation in item.values():
            assert operation["summary"]
            assert operation["description"]
            assert operation["tags"]


async def test_every_path_of_the_document_declares_its_parameters(house: House) -> None:
    for path, item in (await _openapi(house))["paths"].items():
        named = {name.partition(":")[0] for name in re.findall(r"{([^}]*)}", path)}
        for operation in item.values():
            declared = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
            assert declared == named, path
            assert "{" not in re.sub(r"{\w+}", "", path), path


async def test_every_reference_of_the_document_leads_somewhere(house: House) -> None:
    told = await _openapi(house)
    references = list(_every(told, "$ref"))
    assert references
    for reference in references:
        node = told
        for step in reference.removeprefix("#/").split("/"):
            assert step in node, reference
            node = node[step]
    ids = list(_every(told, "operationId"))
    assert len(set(ids)) == len(ids)


async def test_every_refusal_is_documented_as_a_problem(house: House) -> None:
    told = await _openapi(house)
    for path, item in told["paths"].items():
        for method, operation in item.items():
            for status, answer in operation["responses"].items():
                if status[0] in "45" and path not in ("/livez", "/readyz"):
                    assert list(answer["content"]) == ["application/problem+json"], (method, path, status)
    assert "HTTPValidationError" not in str(told)


async def test_the_bodies_of_uploads_are_documented(house: House) -> None:
    paths = (await _openapi(house))["paths"]
    kinds = set(paths["/classify"]["post"]["requestBody"]["content"])
    assert kinds == {"multipart/form-data", "image/*", "application/json"}
    kinds = set(paths["/memory/static"]["post"]["requestBody"]["content"])
    assert kinds == {"multipart/form-data", "application/zip"}


async def test_an_answer_tells_its_stages(house: House) -> None:
    answer = await house.classify(picture("red"), picture("blue"))
    stages = re.findall(r"(\w+);dur=(\d+\.\d+)(?:, |$)", answer.headers["server-timing"])
    assert tuple(name for name, _ in stages) == STAGES


# Metrics --------------------------------------------------------------------------------------------------------------


async def test_every_metric_is_there_from_the_first_moment(build: Build) -> None:
    house = await build()
    answer = await house.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {name: families[name].type for name in NAMES if name in families} == NAMES
    assert all(family.documentation for family in families.values())
    told = await house.metrics()
    for outcome in ("filled", "replaced", "rejected", "duplicate", "skipped", "pending", "lost"):
        assert told[f'dmn_memory_updates_total{{outcome="{outcome}"}}'] == 0
    for agreement in ("all", "text_dynamic", "text_static", "dynamic_static", "none"):
        assert told[f'dmn_predictions_total{{agreement="{agreement}"}}'] == 0
    for stage in STAGES:
        assert told[f'dmn_stage_duration_seconds_count{{stage="{stage}"}}'] == 0
    assert told["dmn_batch_images_count"] == told["dmn_memory_entropy_nats_count"] == 0
    (build_info,) = (series for series in told if series.startswith("dmn_build_info"))
    assert version("dmn-clip-service") in build_info
    assert told[build_info] == 1


class _Books:
    """Keeps account of what is sent, and of what each call should count."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.requests: Counter[str] = Counter()
        self.updates: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.answered = self.decoded = 0

    def enter(self, answer: httpx.Response, route: str) -> httpx.Response:
        assert answer.request is not None
        method = answer.request.method if answer.request.method != "BREW" else "other"
        self.requests[f'dmn_requests_total{{code="{answer.status_code}",method="{method}",route="{route}"}}'] += 1
        return answer

    async def classify(self, *images: bytes, **query: Any) -> None:
        answer = self.enter(await self.house.classify(*images, **query), "/classify")
        told = answer.json()
        if "predictions" not in told:
            self._refused(told)
            return
        self.decoded += len(images)
        for one in told["predictions"]:
            if one["error"]:
                self.faults[one["error"]["type"].rpartition("/")[2]] += 1
            else:
                self.answered += 1
                self.updates[one["learned"]["outcome"]] += 1

    async def upload(self, label: str, *images: bytes) -> None:
        answer = self.enter(await self.house.upload(label, *images), "/memory/static")
        told = answer.json()
        if "shots" not in told:
            self._refused(told)
            return
        self.decoded += len(images)
        self.faults.update(one["error"]["type"].rpartition("/")[2] for one in told["shots"] if one["error"])

    def _refused(self, told: Json) -> None:
        if "errors" in told:
            self.decoded += len(told["errors"])
            self.faults.update(one["problem"]["type"].rpartition("/")[2] for one in told["errors"])
        else:
            self.rejected[told["type"].rpartition("/")[2]] += 1


async def test_two_hundred_calls_change_the_metrics_exactly_as_they_should(build: Build) -> None:
    house = await build()
    books, client = _Books(house), house.client
    books.enter(await house.put(slots=3), "/tenants/{tenant}")
    for i in range(25):
        red, blue = picture("red", i, size=(8, 8)), picture("blue", i, size=(8, 8))
        await books.classify(red, b"", blue)
        await books.classify(red, learn=i % 2 == 0)
        await books.classify(b"nothing", b"")
        await books.classify(red, tenant="nobody")
        await books.upload("red", red, b"")
        await books.upload("purple", red)
        books.enter(await client.get(f"/nothing/{i}"), "unmatched")
        books.enter(await client.get("/memory"), "/memory")
    assert sum(books.requests.values()) == 201
    await books.classify(picture("red", 0, size=(8, 8)), learn=False)
    for _ in range(3):
        books.enter(await client.request("BREW", "/classify"), "/classify")
        books.enter(await client.get("/livez"), "/livez")
        books.enter(await client.get("/docs"), "/docs")
        books.enter(await client.get("/openapi.json"), "/openapi.json")
        books.enter(await client.delete("/memory/dynamic/purple/none"), "/memory/dynamic/{name:path}/{slot}")
        books.rejected["unknown-class"] += 1
        books.enter(await client.get("/problems/internal"), "/problems/{slug}")
    told = await house.metrics()

    def under(name: str) -> dict[str, float]:
        return {series: value for series, value in told.items() if series.startswith(name) and value}

    assert under("dmn_requests_total{") == books.requests
    assert under("dmn_memory_updates_total{") == {
        f'dmn_memory_updates_total{{outcome="{outcome}"}}': count for outcome, count in books.updates.items()
    }
    assert set(books.updates) == {"filled", "replaced", "rejected", "duplicate", "skipped"}
    assert under("dmn_image_errors_total{") == {'dmn_image_errors_total{reason="image-unreadable"}': 25 + 50 + 25}
    assert dict(books.faults) == {"image-unreadable": 100}
    assert sum(under("dmn_predictions_total{").values()) == books.answered == 76
    refused = under("dmn_rejected_total{")
    for reason, count in books.rejected.items():
        assert refused[f'dmn_rejected_total{{reason="{reason}"}}'] == count
    assert told['dmn_stage_duration_seconds_count{stage="decode"}'] == books.decoded
    encoded = books.decoded - 100
    assert told['dmn_stage_duration_seconds_count{stage="queue"}'] == encoded
    assert told["dmn_batch_images_sum"] == encoded
    assert told["dmn_memory_entropy_nats_count"] == books.answered
    by_route: Counter[str] = Counter()
    for series, count in books.requests.items():
        by_route[series.split('route="')[1].removesuffix('"}')] += count
    for route, count in by_route.items():
        assert told[f'dmn_request_duration_seconds_count{{route="{route}"}}'] == count, route
    assert told["dmn_hot_tenants"] == 1
    assert told["dmn_hot_bytes"] > 0
    assert told["dmn_memory_fill_ratio"] == pytest.approx(6 / 9)
    assert told["dmn_queue_images"] == told["dmn_inflight_images"] == 0
    assert any(series.startswith("dmn_store_duration_seconds_count{") for series in told)


async def test_agreement_of_the_branches_is_counted(build: Build) -> None:
    house = await build()
    await house.put()
    await house.upload("red", picture("blue", 1))
    await house.upload("blue", picture("red", 2))
    expected: Counter[str] = Counter()
    for seed in range(10, 16):
        for colour in ("red", "green", "blue"):
            (one,) = await house.predictions(picture(colour, seed))
            text, dynamic, static = (one["readouts"][name]["label"] for name in ("text", "dynamic", "static"))
            kinds = {
                "all": text == dynamic == static,
                "text_dynamic": text == dynamic != static,
                "text_static": text == static != dynamic,
                "dynamic_static": dynamic == static != text,
                "none": len({text, dynamic, static}) == 3,
            }
            expected.update(name for name, so in kinds.items() if so)
    told = await house.metrics()
    counted = {name: told[f'dmn_predictions_total{{agreement="{name}"}}'] for name in kinds}
    assert counted == {name: expected[name] for name in kinds}
    assert sum(count > 0 for count in counted.values()) >= 2


async def test_no_caller_can_add_a_series(build: Build) -> None:
    house = await build()
    await house.put()

    async def strange(i: int) -> None:
        client = house.client
        await client.request(f"METHOD{i}", "/classify")
        await client.get(f"/path/{i}")
        await client.get(f"/problems/{i}")
        await client.get(f"/tenants/tenant{i}")
        await client.get("/memory", headers={"X-Tenant": f"tenant{i}"})
        await client.get(f"/memory/dynamic/class{i}")
        await client.delete(f"/memory/dynamic/class{i}/slot{i}")
        await client.delete(f"/memory/static/shot{i}")
        await client.post("/classify", content=b"x", headers={"Content-Type": f"image/kind{i}"})
        await client.get(f"/livez?query={i}", headers={"X-Request-ID": f"id{i}"})
        await client.put(f"/tenants/made{i}", json={"classes": [f"class{i}"]})
        await house.classify(picture("red", i, size=(8, 8)), tenant=f"made{i}")

    await strange(0)
    await house.metrics()
    await asyncio.gather(*(strange(i) for i in range(100, 104)))
    before = set(await house.metrics())
    await asyncio.gather(*(strange(i) for i in range(1, 8)))
    assert set(await house.metrics()) == before


async def test_a_refused_deletion_leaves_the_memory_hot(build: Build) -> None:
    house = await build()
    await house.put()
    await house.predictions(picture("red", 1))
    assert (await house.metrics())["dmn_hot_tenants"] == 1
    problem(await house.client.delete("/memory/static/none"), "unknown-shot")
    problem(await house.client.delete("/memory/dynamic/red/none"), "unknown-slot")
    problem(await house.client.delete("/tenants/default/classes/none"), "unknown-class")
    problem(await house.client.post("/tenants/default/classes", json={"classes": ["red"]}), "duplicate-class")
    assert (await house.metrics())["dmn_hot_tenants"] == 1
