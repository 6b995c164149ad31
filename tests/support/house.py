"""The whole service over an encoder without weights, called over HTTP without a socket."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from core.encoders.protocol import Encoder
from service.app import create_app
from service.services import Rooms
from service.settings import Settings
from service.wiring import open_rooms
from tests.support.fakes import FakeEncoder
from tests.support.replicas import without_housekeeper

STATUS = {
    "invalid-request": 422,
    "unsupported-media-type": 415,
    "image-unreadable": 422,
    "image-too-large": 413,
    "body-too-large": 413,
    "too-many-images": 413,
    "not-found": 404,
    "method-not-allowed": 405,
    "unknown-tenant": 404,
    "unknown-class": 404,
    "unknown-shot": 404,
    "unknown-slot": 404,
    "unknown-job": 404,
    "unknown-snapshot": 404,
    "no-classes": 409,
    "duplicate-class": 422,
    "limit-exceeded": 422,
    "fingerprint-mismatch": 409,
    "idempotency-conflict": 422,
    "unauthenticated": 401,
    "forbidden": 403,
    "rate-limited": 429,
    "queue-full": 503,
    "draining": 503,
    "store-down": 503,
    "deadline-exceeded": 504,
    "internal": 500,
}
"""Problem types and their statuses, as the outside surface fixes them."""

CLASSES = ("red", "green", "blue")
PATIENCE_S = 60.0
"""How long anything may take that is no fault: no test asserts it."""

UNHURRIED = {"canary_s": 0, "deadline_ms": 600_000, "max_wait_ms": 0, "store_timeout_ms": 60_000}
"""Settings with which no call is refused because time passes; a test about one of them gives its own."""

Json = dict[str, Any]


class SoftEncoder(FakeEncoder):
    """Is never so sure that rounding alone decides what is kept."""

    logit_scale = 4.0


class GatedEncoder(SoftEncoder):
    """Waits with images until its gate opens; `entered` says that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        return super().encode_images(pixels)

    def shut(self) -> None:
        """Hold the next batch."""
        self.gate.clear()
        self.entered.clear()

    async def reached(self) -> None:
        """Return once a batch waits at the gate."""
        assert await asyncio.to_thread(self.entered.wait, PATIENCE_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class House:
    """A client of one running app, and its rooms for those who look inside."""

    client: httpx.AsyncClient
    app: FastAPI
    rooms: Rooms

    async def put(self, tenant: str = "default", **config: Any) -> httpx.Response:
        """Create or replace a tenant; without `classes` it has the colours."""
        return await self.client.put(f"/tenants/{tenant}", json={"classes": list(CLASSES)} | config)

    async def classify(
        self, *images: bytes, tenant: str = "default", headers: Mapping[str, str] | None = None, **query: Any
    ) -> httpx.Response:
        """Classify images by one multipart call."""
        parts = [("images", (f"{i}.png", image, "image/png")) for i, image in enumerate(images)]
        told = {"X-Tenant": tenant} | dict(headers or {})
        return await self.client.post("/classify", files=parts, params=query, headers=told)

    async def predictions(self, *images: bytes, tenant: str = "default", **query: Any) -> list[Json]:
        """Classify images that are fine, and return their predictions."""
        answer = await self.classify(*images, tenant=tenant, **query)
        assert answer.status_code == 200, answer.text
        found: list[Json] = answer.json()["predictions"]
        return found

    async def outcomes(self, *images: bytes, tenant: str = "default", **query: Any) -> list[str]:
        """Classify images that are fine, and return what the memory did with each."""
        return [one["learned"]["outcome"] for one in await self.predictions(*images, tenant=tenant, **query)]

    async def upload(
        self, label: str, *images: bytes, tenant: str = "default", headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """Upload shots of one class."""
        parts = [("images", (f"{i}.png", image, "image/png")) for i, image in enumerate(images)]
        told = {"X-Tenant": tenant} | dict(headers or {})
        return await self.client.post("/memory/static", data={"label": label}, files=parts, headers=told)

    async def upload_zip(self, body: bytes, tenant: str = "default") -> httpx.Response:
        """Upload shots as a zip of folders."""
        told = {"X-Tenant": tenant, "Content-Type": "application/zip"}
        return await self.client.post("/memory/static", content=body, headers=told)

    async def memory(self, tenant: str = "default") -> Json:
        """Return what `GET /memory` says."""
        answer = await self.client.get("/memory", headers={"X-Tenant": tenant})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def slots(self, name: str, tenant: str = "default") -> list[Json]:
        """Return all slots of a class."""
        path = f"/memory/dynamic/{quote(name, safe='')}"
        answer = await self.client.get(path, params={"limit": 1000}, headers={"X-Tenant": tenant})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["items"])

    async def banks(self, tenant: str = "default") -> dict[str, list[Json]]:
        """Return all slots of all classes."""
        named = [one["label"] for one in (await self.memory(tenant))["dynamic"]["classes"]]
        return {name: await self.slots(name, tenant) for name in named}

    async def shots(self, tenant: str = "default") -> list[Json]:
        """Return all shots."""
        answer = await self.client.get("/memory/static", params={"limit": 1000}, headers={"X-Tenant": tenant})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["items"])

    async def reset(self, scope: str, tenant: str = "default", classes: Sequence[str] | None = None) -> Json:
        """Empty memories, and return the stamp after it."""
        body: Json = {"scope": scope} | ({} if classes is None else {"classes": list(classes)})
        answer = await self.client.post("/admin/memory/reset", json=body, headers={"X-Tenant": tenant})
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["memory"])

    async def exported(self, tenant: str = "default") -> bytes:
        """Return a tenant's memory as a file."""
        answer = await self.client.get("/admin/memory/export", headers={"X-Tenant": tenant})
        assert answer.status_code == 200, answer.text
        assert int(answer.headers["content-length"]) == len(answer.content)
        return answer.content

    async def imported(self, data: bytes, tenant: str = "default") -> httpx.Response:
        """Bring a file in as a tenant's memory."""
        return await self.client.post("/admin/memory/import", content=data, headers={"X-Tenant": tenant})

    async def metrics(self) -> dict[str, float]:
        """Return every sample of `/metrics` as `name{label="value",...}` -> value, labels in order."""
        text = (await self.client.get("/metrics")).text
        return {
            _series(sample.name, sample.labels): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


class Build(Protocol):
    """Opens a house with an encoder and settings of the test's own."""

    async def __call__(self, encoder: Encoder | None = None, **settings: Any) -> House: ...


@asynccontextmanager
async def opened(
    encoder: Encoder,
    following: Encoder | None = None,
    *,
    housekeeping: bool = False,
    clock: Callable[[], float] | None = None,
    **settings: Any,
) -> AsyncIterator[House]:
    """Open a house, whatever the environment says, and close it again.

    Without housekeeping nothing depends on the time that passes: class statistics are not exchanged between two calls,
    and writes that wait for the store are not sent. `clock` is that of the house, in seconds.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("DMN_")]:
            patch.delenv(name)
        whole = Settings(**({"decode_workers": 2, "store": "memory"} | UNHURRIED | settings))
    async with AsyncExitStack() as stack:
        with nullcontext() if housekeeping else without_housekeeper():
            rooms = await stack.enter_async_context(open_rooms(whole, encoder, following, clock=clock))
        app = create_app(whole, rooms)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            yield House(client=client, app=app, rooms=rooms)


def problem(answer: httpx.Response, slug: str) -> Json:
    """Return the problem of an answer, which must be of this type and whole."""
    assert answer.status_code == STATUS[slug], answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    told: Json = answer.json()
    sound(told, slug)
    assert told["request_id"] == answer.headers["x-request-id"]
    assert ("retry-after" in answer.headers) == ("retry_after" in told)
    return told


def sound(told: Json, slug: str) -> None:
    """Check one problem object, of an answer or of one image in it."""
    assert told["type"] == f"/problems/{slug}", told
    assert told["status"] == STATUS[slug]
    assert told["title"]
    assert told["detail"].endswith("."), told["detail"]
    assert len(told["detail"].split()) >= 3, told["detail"]
    assert told["request_id"]


def zipped(entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip of these files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


async def soon(call: Awaitable[httpx.Response], patience_s: float = PATIENCE_S) -> httpx.Response:
    """Return the answer of a call that must not hang."""
    async with asyncio.timeout(patience_s):
        return await call


async def until(condition: Callable[[], bool]) -> None:
    """Let the others go on until something is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for sends no event
            await asyncio.sleep(0)


@dataclass(slots=True)
class RawCall:
    """One call without a client library: headers as they are, and a client that may leave at any moment."""

    app: FastAPI
    path: str
    body: Sequence[bytes] = ()
    headers: Sequence[tuple[bytes, bytes]] = ()
    method: str = "POST"
    leaves: bool = False
    sent: list[Any] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Send the body, chunk by chunk; then leave at once if told so, else when `gone` is set."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"test"), *self.headers],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        coming = [{"type": "http.request", "body": part, "more_body": True} for part in self.body]
        if coming and not self.leaves:
            coming[-1]["more_body"] = False

        async def receive() -> Any:
            if coming:
                return coming.pop(0)
            if not self.leaves:
                await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.sent.append(message)

        await self.app(scope, receive, send)

    @property
    def status(self) -> int:
        """Status of the answer."""
        return int(self.sent[0]["status"])

    @property
    def told(self) -> Json:
        """The answer's body as JSON."""
        return dict(json.loads(b"".join(message.get("body", b"") for message in self.sent[1:])))


def _series(name: str, labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{inside}}}" if inside else name
