"""Traces: what a call's laps become, and that nothing of OpenTelemetry is there while nobody asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.settings import Settings
from service.telemetry import tracing
from service.telemetry.logs import traceparent
from service.telemetry.spans import Spans, over_otlp, phases
from tests.support.process import ROOT

SENDING = ("service.telemetry.spans", "opentelemetry.sdk.trace", "opentelemetry.exporter")
"""What others do not import for themselves: FastAPI and redis bring parts of OpenTelemetry along."""

PARENT = f"00-{'a1' * 16}-{'b2' * 8}-01"


def at(seconds: int) -> int:
    """Return a moment as laps have it."""
    return seconds * 1_000_000_000


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Spans:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(provider)


def test_a_stage_lasts_from_the_first_image_that_enters_it_to_the_last_that_leaves() -> None:
    one = [("decode", 1.0, at(11)), ("queue", 2.0, at(13))]
    other = [("decode", 3.0, at(14)), ("queue", 0.5, at(15))]
    assert phases([one, other]) == [("decode", at(10), at(14), 2), ("queue", at(11), at(15), 2)]


def test_the_store_before_the_memory_and_the_store_after_it_are_two_stretches_of_time() -> None:
    one = [("store", 1.0, at(11)), ("memory", 1.0, at(12)), ("store", 1.0, at(13))]
    other = [("store", 1.0, at(11)), ("memory", 1.0, at(12)), ("store", 1.0, at(15))]
    assert phases([one, other]) == [
        ("store", at(10), at(11), 2),
        ("memory", at(11), at(12), 2),
        ("store", at(12), at(15), 2),
    ]


def test_an_image_without_laps_says_nothing() -> None:
    assert phases([[], [("decode", 1.0, at(2))]]) == [("decode", at(1), at(2), 1)]
    assert phases([]) == []


def test_stages_stand_where_they_were_in_time(spans: Spans, exporter: InMemorySpanExporter) -> None:
    token = traceparent.set(PARENT)
    spans.stages([[("decode", 60.0, at(100))]])
    traceparent.reset(token)
    (span,) = exporter.get_finished_spans()
    assert (span.start_time, span.end_time) == (at(40), at(100))


def test_stages_without_a_request_are_no_spans(spans: Spans, exporter: InMemorySpanExporter) -> None:
    spans.stages([[("decode", 1.0, at(2))]])
    assert not exporter.get_finished_spans()


def test_a_request_is_over_when_it_is_closed(spans: Spans, exporter: InMemorySpanExporter) -> None:
    span = spans.request({})
    assert traceparent.get().split("-")[1] == span.trace_id
    span.close(request_id="r1", method="GET", route="/memory", status=200)
    assert not traceparent.get()
    assert [one.name for one in exporter.get_finished_spans()] == ["GET /memory"]


def test_the_resource_names_the_service_and_the_environment_may_say_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    provider = over_otlp()
    assert provider.resource.attributes["service.name"] == "dmn-clip-service"
    provider.shutdown()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=night")
    provider = over_otlp()
    told = provider.resource.attributes
    assert (told["service.name"], told["deployment.environment"]) == ("mine", "night")
    provider.shutdown()


async def test_traces_are_off_unless_asked_for() -> None:
    async with tracing.opened(Settings()) as spans:
        assert spans is None


async def test_a_missing_package_is_one_sentence_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "service.telemetry.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"pip install 'dmn-clip-service\[otel\]'"):
        async with tracing.opened(Settings(traces="otlp")):
            pass


@pytest.mark.slow
def test_nothing_that_sends_spans_is_imported_while_traces_are_off() -> None:
    code = (
        "import sys, service.app, service.cli.main, service.server.single_process\n"
        "import service.multiprocess.frontend, service.multiprocess.worker\n"
        f"SENDING = {SENDING}\n"
        "print([name for name in sys.modules if name.startswith(SENDING)])"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
