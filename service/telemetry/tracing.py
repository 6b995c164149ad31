"""Whether there are traces: OpenTelemetry is an optional extra, of which nothing is imported before it is needed.

While traces are off a call pays for a comparison with None; `service.telemetry.spans` makes them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from service.settings import Settings

if TYPE_CHECKING:
    from .spans import Spans


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Spans | None]:
    """Open what the settings ask for, None where traces are off; at the end what was not sent yet is sent.

    Raises:
        ValueError: OpenTelemetry is not installed.
    """
    if settings.traces == "off":
        yield None
        return
    try:
        from .spans import Spans, over_otlp  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        raise ValueError(
            f"DMN_TRACES={settings.traces} needs the package {error.name}: pip install 'dmn-clip-service[otel]'."
        ) from error
    spans = Spans(over_otlp())
    try:
        yield spans
    finally:
        await spans.aclose()
