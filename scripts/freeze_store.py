"""What a release writes into a Redis, as a file that later ones are tested with.

`PYTHONPATH=OLD python scripts/freeze_store.py tests/golden/stores/NAME.json`, where OLD is a checkout of that release.

A service of its own, over a real server, gets three tenants by HTTP: `paper` with the method `dmn`, `trained` with
offsets besides, and `auto`. The file holds every key that this leaves, and what the service told of it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import torch
from redis.asyncio import Redis
from torch import Tensor

from core.numerics import unit
from service.app import create_app
from service.settings import Settings
from service.wiring import open_rooms
from tests.support.fakes import FakeEncoder, picture
from tests.support.servers import BINARIES, server

Json = dict[str, Any]
CLASSES = ("red", "green", "blue")
TENANTS: Mapping[str, Json] = {
    "paper": {"method": "dmn", "slots": 4, "retention": "images"},
    "trained": {"method": "dmn", "slots": 4},
    "auto": {"method": "auto", "slots": 4},
}
ASKED = tuple(picture(colour, 100 + seed) for seed, colour in enumerate((*CLASSES, "yellow")))
"""Pictures that are asked about without being learned."""

_TIMEOUT_S = 60.0
_PAUSE_S = 0.05


class SmallEncoder(FakeEncoder):
    """Sees four patches: its features make a small file."""

    dim = 3 + 4 * 3
    logit_scale = 8.0

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Return the mean colour and what each quarter has besides."""
        small = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 2)
        mean = small.mean((2, 3))
        texture = (small - mean[:, :, None, None]).flatten(1)
        return unit(torch.cat((mean - 0.3, 2.0 * texture), 1) + 1e-4)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    options.file.write_text(json.dumps(asyncio.run(_frozen()), indent=1, sort_keys=True) + "\n")


async def _frozen() -> Json:
    with server(str(BINARIES["valkey"])) as running:
        settings = Settings(store=running.url, decode_workers=1, batch_images=1)
        async with open_rooms(settings, SmallEncoder()) as rooms:
            app = create_app(settings, rooms)
            transport = httpx.ASGITransport(app)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://test", timeout=_TIMEOUT_S) as client,
            ):
                for tenant, config in TENANTS.items():
                    await _live(client, tenant, config)
                told = {tenant: await told_of(client, tenant) for tenant in TENANTS}
        return {"told": told, "keys": await _keys(running.url)}


async def _live(client: httpx.AsyncClient, tenant: str, config: Json) -> None:
    """Let a tenant see some pictures, have some shots, purge a slot, train, and take a snapshot."""
    who = {"X-Tenant": tenant}
    await _done(client.put(f"/tenants/{tenant}", json={"classes": list(CLASSES), **config}))
    for seed in range(20):
        await _done(client.post("/classify", content=picture(CLASSES[seed % 3], seed), headers=_png(who)))
    for colour in CLASSES:
        shots = [("images", (f"{at}.png", picture(colour, 50 + at), "image/png")) for at in range(2)]
        await _done(client.post("/memory/static", data={"label": colour}, files=shots, headers=who))
    slots = (await _done(client.get("/memory/dynamic/red", headers=who)))["items"]
    (await client.delete(f"/memory/dynamic/red/{slots[0]['slot']}", headers=who)).raise_for_status()
    if tenant == "trained":
        job = await _done(client.post("/memory/static/train", json={"epochs": 2}, headers=who))
        await _over(client, job["id"], who)
    await _done(client.post("/admin/memory/snapshots", headers=who))


async def told_of(client: httpx.AsyncClient, tenant: str) -> Json:
    """Return what a service tells of a tenant: its configuration, its memories, and its answers to some pictures."""
    who = {"X-Tenant": tenant}
    memory = await _done(client.get("/memory", headers=who))
    return {
        "tenant": await _done(client.get(f"/tenants/{tenant}")),
        "memory": memory,
        "slots": {one: (await _done(client.get(f"/memory/dynamic/{one}", headers=who)))["items"] for one in CLASSES},
        "shots": (await _done(client.get("/memory/static", headers=who)))["items"],
        "snapshots": (await _done(client.get("/admin/memory/snapshots", headers=who)))["items"],
        "answers": [
            (await _done(client.post("/classify?learn=false", content=one, headers=_png(who))))["predictions"][0]["top"]
            for one in ASKED
        ],
    }


async def _over(client: httpx.AsyncClient, job: str, who: Mapping[str, str]) -> None:
    ends = time.monotonic() + _TIMEOUT_S
    while (await _done(client.get(f"/jobs/{job}", headers=who)))["state"] != "done":
        if time.monotonic() > ends:
            raise TimeoutError(f"The job {job} did not end.")
        await asyncio.sleep(_PAUSE_S)


async def _done(call: Any) -> Json:
    answer = await call
    answer.raise_for_status()
    found: Json = answer.json()
    return found


def _png(who: Mapping[str, str]) -> dict[str, str]:
    return {**who, "Content-Type": "image/png"}


async def _keys(url: str) -> Json:
    """Return what every lasting key holds: its type, and its values in base64."""
    async with Redis.from_url(url) as client:
        found: Json = {}
        for key in sorted(await client.keys("*")):
            if await client.pttl(key) < 0:
                kind = (await client.type(key)).decode()
                found[key.decode()] = {"type": kind, "values": _coded(await _READ[kind](client, key))}
        return found


_READ: Mapping[str, Callable[[Any, bytes], Any]] = {
    "string": lambda client, key: client.get(key),
    "hash": lambda client, key: client.hgetall(key),
    "set": lambda client, key: client.smembers(key),
    "zset": lambda client, key: client.zrange(key, 0, -1, withscores=True),
    "stream": lambda client, key: client.xrange(key),
}


def _coded(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return [[_coded(name), _coded(own)] for name, own in sorted(value.items())]
    if isinstance(value, list | tuple | set):
        return [_coded(one) for one in (sorted(value) if isinstance(value, set) else value)]
    return value


async def thaw(client: Any, keys: Json) -> None:
    """Write the keys of a file into a server."""
    for key, held in keys.items():
        await _WRITE[held["type"]](client, key, held["values"])


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


async def _write_stream(client: Any, key: str, entries: list[Any]) -> None:
    for id_, values in entries:
        await client.execute_command("XADD", key, _bytes(id_), *(_bytes(one) for pair in values for one in pair))


_WRITE: Mapping[str, Callable[[Any, str, Any], Any]] = {
    "string": lambda client, key, text: client.set(key, _bytes(text)),
    "hash": lambda client, key, pairs: client.hset(key, mapping={_bytes(name): _bytes(own) for name, own in pairs}),
    "set": lambda client, key, members: client.sadd(key, *map(_bytes, members)),
    "zset": lambda client, key, pairs: client.zadd(key, {_bytes(name): score for name, score in pairs}),
    "stream": _write_stream,
}


if __name__ == "__main__":
    main()
