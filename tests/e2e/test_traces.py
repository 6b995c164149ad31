"""Traces as a collector hears them: over OTLP, from a service of one process and from one of several."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.fakes import picture
from tests.support.process import PATIENCE_S, Command

TRACE = "a1" * 16
NAMES = ["POST /classify", "decode", "encode", "memory", "queue", "store", "store"]


class Collector:
    """Takes spans over OTLP, as any collector does."""

    def __init__(self) -> None:
        self.exports: queue.Queue[ExportTraceServiceRequest] = queue.Queue()
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                collector.exports.put(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[Collector]:
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def spans(self, count: int) -> list[Span]:
        """Wait until so many spans of the trace are here, and return them."""
        found: list[Span] = []
        while len(found) < count:
            for told in self.exports.get(timeout=PATIENCE_S).resource_spans:
                attributes = {one.key: one.value.string_value for one in told.resource.attributes}
                self.services.add(attributes["service.name"])
                every = [span for scope in told.scope_spans for span in scope.spans]
                found += [span for span in every if span.trace_id.hex() == TRACE]
        return found


def ask(url: str) -> httpx.Response:
    """Name classes, and classify a picture under a trace of ours."""
    with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as own:
        assert own.put("/tenants/default", json={"classes": ["red", "blue"]}).status_code == 200
        files = [("images", ("a.png", picture("red"), "image/png"))]
        headers = {"traceparent": f"00-{TRACE}-{'b2' * 8}-01"}
        return own.post("/classify", files=files, headers=headers)


def check(spans: list[Span], collector: Collector) -> None:
    """Check that spans are those of the request and of its stages."""
    assert sorted(span.name for span in spans) == NAMES
    (request,) = (span for span in spans if span.name == "POST /classify")
    assert request.parent_span_id.hex() == "b2" * 8
    assert {span.parent_span_id for span in spans if span is not request} == {request.span_id}
    assert collector.services == {"dmn-clip-service"}


def test_a_collector_hears_of_a_request_and_its_stages_from_several_processes() -> None:
    with Collector().running() as collector:
        told = {"DMN_TRACES": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        with Command("fake", "serve", "--port", "0", "--http-workers", "1", DMN_DRAIN_DELAY_S="0", **told) as command:
            reply = ask(command.url())
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-request-id"] == TRACE
            check(collector.spans(len(NAMES)), collector)
            command.signal(signal.SIGTERM)
            assert command.ended() == 0


def test_what_was_not_sent_yet_is_sent_when_the_service_stops() -> None:
    with Collector().running() as collector:
        told = {"DMN_TRACES": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "900000"}
        with Command("fake", "serve", "--port", "0", DMN_DRAIN_DELAY_S="0", **told) as command:
            reply = ask(command.url())
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-request-id"] == TRACE
            assert collector.exports.empty()
            command.signal(signal.SIGTERM)
            assert command.ended() == 0
            check(collector.spans(len(NAMES)), collector)


def test_a_collector_that_is_away_is_no_reason_not_to_answer_or_not_to_stop() -> None:
    told = {"DMN_TRACES": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with Command("fake", "serve", "--port", "0", DMN_DRAIN_DELAY_S="0", **told) as command:
        url = command.url()
        assert ask(url).status_code == 200
        command.line(lambda line: "opentelemetry" in line)
        assert ask(url).status_code == 200
        command.signal(signal.SIGTERM)
        assert command.ended() == 0
