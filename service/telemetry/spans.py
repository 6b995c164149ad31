"""Traces: one span a request and one a stage of it, as OpenTelemetry has them. The one file that imports it.

No span names a tenant, a class, an address or anything that a body holds.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from contextvars import Token
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .logs import traceparent
from .metrics import Lap

_NAME = "dmn-clip-service"
_W3C = TraceContextTextMapPropagator()
_FAULT = 500

_CLOSING_S = 5.0
"""How long a service that stops waits for its last spans to be taken: a collector that is away must not hold it."""


def over_otlp() -> TracerProvider:
    """Return what sends spans in batches, by OTLP over HTTP; OpenTelemetry's own variables, `OTEL_*`, say the rest.

    They name the collector (`OTEL_EXPORTER_OTLP_ENDPOINT`), its headers, the sampler, the service's name and more.
    """
    own = Resource({"service.name": _NAME, "service.version": version(_NAME)})
    told = own.merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=Resource.create(dict(told.attributes)), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Spans:
    """Makes the spans of requests and of their stages."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("dmn", version(_NAME))

    def request(self, headers: Mapping[str, str]) -> RequestSpan:
        """Return a span that begins now, under the one that `traceparent` names if there is such a header."""
        told = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        return RequestSpan(self._tracer.start_span("request", _W3C.extract(told), trace.SpanKind.SERVER))

    def stages(self, walks: Sequence[Sequence[Lap]]) -> None:
        """Tell of the stages of the request at hand, whose images' laps these are; of none if there is no request."""
        if not traceparent.get():
            return
        parent = _W3C.extract({"traceparent": traceparent.get()})
        for name, began, ended, images in phases(walks):
            span = self._tracer.start_span(name, parent, attributes={"dmn.images": images}, start_time=began)
            span.end(ended)

    async def aclose(self) -> None:
        """Send what was not sent yet, as far as it is taken in time."""
        # Not in one of the loop's threads: a process that ends waits for those, however long they take.
        last = threading.Thread(target=self._provider.shutdown, name="dmn-last-spans", daemon=True)
        last.start()
        await asyncio.to_thread(last.join, _CLOSING_S)


class RequestSpan:
    """The span of one request. What runs in its context, here or in a worker process, tells its stages under it."""

    def __init__(self, span: trace.Span) -> None:
        own = span.get_span_context()
        self._span = span
        self.trace_id = trace.format_trace_id(own.trace_id)
        name = f"00-{self.trace_id}-{trace.format_span_id(own.span_id)}-{own.trace_flags:02x}"
        self._token: Token[str] = traceparent.set(name)

    def close(self, *, request_id: str, method: str, route: str, status: int) -> None:
        """End it, and say what was asked and how it went; `route` is the template."""
        self._span.update_name(f"{method} {route}")
        self._span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "dmn.request_id": request_id,
            }
        )
        if status >= _FAULT:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()
        traceparent.reset(self._token)


def phases(walks: Sequence[Sequence[Lap]]) -> list[tuple[str, int, int, int]]:
    """Return a call's stages, of all its images together: (name, began, ended, images), in nanoseconds since 1970.

    An image's first lap of a name is told with the first ones of the others, its second with their second ones: the
    store is met before the memory is read and again after it, and these two are not one stretch of time.
    """
    found: dict[tuple[str, int], tuple[int, int, int]] = {}
    for walk in walks:
        times: dict[str, int] = {}
        for name, seconds, ended in walk:
            times[name] = times.get(name, 0) + 1
            start = ended - round(1e9 * seconds)
            began, last, images = found.get((name, times[name]), (start, ended, 0))
            found[name, times[name]] = min(began, start), max(last, ended), images + 1
    return [(name, *stretch) for (name, _), stretch in found.items()]
