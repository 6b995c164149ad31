"""Traces: one span a request and one a stage of it, under the caller's own, and no name in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from service.app import create_app
from service.telemetry.spans import Spans
from tests.support.fakes import picture
from tests.support.house import Build, House, problem

TRACE, CALLER = "a1" * 16, "b2" * 8
SAMPLED = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
STAGES = ["decode", "queue", "encode", "store", "memory", "store"]


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A house whose spans are kept."""

    house: House
    exporter: InMemorySpanExporter

    @property
    def client(self) -> httpx.AsyncClient:
        return self.house.client

    def spans(self) -> Sequence[ReadableSpan]:
        """Return what was told since the last time, requests first."""
        told = sorted(self.exporter.get_finished_spans(), key=lambda span: span.kind is not SpanKind.SERVER)
        self.exporter.clear()
        return told


@pytest_asyncio.fixture(loop_scope="session")
async def traced(build: Build) -> AsyncIterator[Traced]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    rooms = replace((await build()).rooms, traces=Spans(provider))
    app = create_app(rooms.settings, rooms)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
        ) as client,
    ):
        house = House(client=client, app=app, rooms=rooms)
        await house.put()
        exporter.clear()
        yield Traced(house=house, exporter=exporter)


def trace_of(span: ReadableSpan) -> str:
    return format_trace_id(span.context.trace_id)


def id_of(span: ReadableSpan) -> str:
    return format_span_id(span.context.span_id)


def parent_of(span: ReadableSpan) -> str | None:
    return None if span.parent is None else format_span_id(span.parent.span_id)


async def test_a_request_is_one_span_and_each_stage_one_under_it(traced: Traced) -> None:
    answer = await traced.house.classify(picture("red"))
    request, *stages = traced.spans()
    assert (request.name, request.kind, request.parent) == ("POST /classify", SpanKind.SERVER, None)
    assert sorted(stage.name for stage in stages) == sorted(STAGES)
    assert {parent_of(stage) for stage in stages} == {id_of(request)}
    assert {trace_of(span) for span in (request, *stages)} == {answer.headers["x-request-id"]}
    assert request.status.status_code is StatusCode.UNSET


async def test_an_upload_has_its_stages_too(traced: Traced) -> None:
    await traced.house.upload("red", picture("red", 1), picture("red", 2))
    request, *stages = traced.spans()
    assert request.name == "POST /memory/static"
    assert sorted(stage.name for stage in stages) == ["decode", "encode", "queue"]


async def test_the_callers_trace_goes_on_and_is_the_request_id(traced: Traced) -> None:
    answer = await traced.client.get("/memory", headers=SAMPLED)
    (request,) = traced.spans()
    assert (trace_of(request), parent_of(request)) == (TRACE, CALLER)
    assert answer.headers["x-request-id"] == TRACE


async def test_a_callers_own_id_comes_back_and_leads_to_the_trace(traced: Traced) -> None:
    answer = await traced.client.get("/memory", headers={"X-Request-ID": "mine-1"})
    (request,) = traced.spans()
    assert answer.headers["x-request-id"] == "mine-1"
    assert request.attributes is not None
    assert request.attributes["dmn.request_id"] == "mine-1"


async def test_a_caller_that_does_not_sample_is_heeded(traced: Traced) -> None:
    answer = await traced.client.get("/memory", headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
    assert not traced.spans()
    assert answer.headers["x-request-id"] == TRACE


@pytest.mark.parametrize(
    "header",
    [f"00-{'0' * 32}-{CALLER}-01", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{CALLER}-01", "00-x-y-01", "\x1b[31m"],
)
async def test_a_header_that_names_no_span_begins_a_trace(traced: Traced, header: str) -> None:
    answer = await traced.client.get("/memory", headers={"traceparent": header})
    (request,) = traced.spans()
    assert request.parent is None
    assert answer.headers["x-request-id"] == trace_of(request) != TRACE


async def test_probes_are_not_traced(traced: Traced) -> None:
    for path in ("/livez", "/readyz", "/metrics"):
        await traced.client.get(path)
    assert not traced.spans()


async def test_calls_that_share_a_batch_keep_their_own_traces(traced: Traced) -> None:
    await traced.house.put("other")
    traced.exporter.clear()
    calls = [traced.house.classify(picture("red", i), tenant=("default", "other")[i % 2]) for i in range(8)]
    answers = await asyncio.gather(*calls)
    told = traced.spans()
    for answer in answers:
        own = [span for span in told if trace_of(span) == answer.headers["x-request-id"]]
        assert sorted(span.name for span in own) == sorted(["POST /classify", *STAGES])
    assert len(told) == 8 * 7


async def test_a_bad_image_is_told_as_far_as_it_came(traced: Traced) -> None:
    await traced.house.classify(b"nothing")
    request, *stages = traced.spans()
    assert [stage.name for stage in stages] == ["decode"]
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 422
    assert request.status.status_code is StatusCode.UNSET


async def test_a_fault_of_ours_is_an_error(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("swordfish")

    monkeypatch.setattr(traced.house.rooms.store, "load", broken)
    problem(await traced.client.get("/memory"), "internal")
    (request,) = traced.spans()
    assert request.status.status_code is StatusCode.ERROR
    assert "swordfish" not in request.to_json()


async def test_no_span_names_a_tenant_a_class_an_image_or_a_key(traced: Traced) -> None:
    client, secret = traced.client, "swordfish"
    told: dict[str, Any] = {"headers": {"X-Tenant": secret, "Authorization": f"Bearer {secret}"}}
    await client.put(f"/tenants/{secret}", json={"classes": [f"{secret} red", "blue"]})
    files = [("images", (f"{secret}.png", picture("red"), "image/png"))]
    await client.post("/classify", files=files, **told)
    await client.post("/memory/static", files=files, data={"label": f"{secret} red"}, **told)
    await client.get(f"/memory/dynamic/{secret} red", **told)
    await client.get(f"/{secret}?tenant={secret}", **told)
    await client.request(secret.upper(), f"/tenants/{secret}", **told)
    await client.get("/memory", headers={"User-Agent": secret, "X-Request-ID": "r1", "tracestate": f"{secret}=1"})
    await client.delete(f"/tenants/{secret}")
    spans = traced.spans()
    assert len([span for span in spans if span.kind is SpanKind.SERVER]) == 8
    assert not [span.to_json() for span in spans if secret in span.to_json().lower()]
