"""Checks of a server before it is used: version, loading, scripts, write access."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from hashlib import sha1
from typing import Any

from redis import exceptions as told
from redis.asyncio import (
    Redis,
)
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from service.errors import StoreDown

from .client import Single
from .cluster import AWAY, Cluster
from .errors import FAULTS, causes, down

OLDEST = (6, 2)
"""Version that the scripts need."""

LOADING_S = 15.0
"""How long `check` waits for a server that has just been started and reads its data."""

_LOADING_PAUSE_S = 0.1


async def check(client: Redis, *, loading_s: float = LOADING_S) -> None:
    """Return if the server, and every node of a cluster, is fit to keep memories.

    Raises:
        StoreDown: it is not; one line that names the server and says why.
    """
    shown = getattr(client, "shown", "")
    try:
        nodes = await _loaded(client, loading_s)
        for where, about in nodes.items():
            _fit(f"The store {where}".strip(), about, cluster=isinstance(client, Cluster))
        await _try_scripts(client)
    except FAULTS as error:
        raise down(error, shown) from error


# Whether a server is fit ----------------------------------------------------------------------------------------------

_PROBE = """
redis.call('SET', KEYS[1], redis.sha1hex(struct.pack('>d', 0.5)), 'PX', 1000)
local kept = redis.call('GET', KEYS[1])
redis.call('UNLINK', KEYS[1])
return kept
"""
"""Uses what the scripts of the store use: it writes, packs and hashes. Its key would go by itself after a second."""


async def _loaded(client: Redis, seconds: float) -> dict[str, dict[str, Any]]:
    """Return what each node says of itself, by where it is, once none is reading its data any more.

    Raises:
        BusyLoadingError: one still does after so many seconds.
    """
    loop = asyncio.get_running_loop()
    ends = loop.time() + seconds
    while True:
        try:
            nodes = await (_ask_all(client) if isinstance(client, Cluster) else _ask_one(client))
            if any(about.get("loading") == 1 for about in nodes.values()):
                raise told.BusyLoadingError
        except FAULTS as error:
            loads = any(isinstance(one, told.BusyLoadingError) for one in causes(error))
            if not loads or loop.time() >= ends:
                raise
        else:
            return nodes
        await asyncio.sleep(_LOADING_PAUSE_S)


async def _ask_one(client: Redis) -> dict[str, dict[str, Any]]:
    return {getattr(client, "shown", ""): await client.info()}


async def _ask_all(client: Cluster) -> dict[str, dict[str, Any]]:
    """Ask every node; a replica that is away does not keep a cluster from its work."""
    primaries, replicas = await client.nodes()
    answers = await asyncio.gather(*(node.info() for node in (*primaries, *replicas)), return_exceptions=True)
    out: dict[str, dict[str, Any]] = {}
    for node, about in zip((*primaries, *replicas), answers, strict=True):
        if not isinstance(about, BaseException):
            out[node.shown] = about
        elif not isinstance(about, FAULTS):
            raise about
        elif node not in replicas or not isinstance(about, AWAY):
            raise down(about, node.shown) from about
    return out


def _fit(store: str, about: Mapping[str, Any], *, cluster: bool) -> None:
    """Return if a server says of itself what we need.

    Raises:
        StoreDown: it does not.
    """
    if "sentinel" in (about.get("redis_mode"), about.get("server_mode")):
        raise StoreDown(f"{store} is a Sentinel and keeps nothing: use redis+sentinel://, with the service's name.")
    version = str(about.get("redis_version", "unknown"))
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise StoreDown(f"{store} is version {version}; {OLDEST[0]}.{OLDEST[1]} or newer is needed.")
    if about.get("cluster_enabled") == 1 and not cluster:
        raise StoreDown(f"{store} is a node of a cluster: use redis+cluster:// (or rediss+cluster://).")
    if about.get("role") != "master" and not cluster:
        raise StoreDown(f"{store} is a read-only replica: name its primary, or use redis+sentinel://.")
    policy = about.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StoreDown(
            f"{store} has the maxmemory-policy {policy}: it would drop memories without a word. Set it to noeviction."
        )


async def _try_scripts(client: Redis) -> None:
    """Run a script that writes, on every primary, in both ways that the store uses."""
    digest = sha1(_PROBE.encode(), usedforsecurity=False).hexdigest()
    for key in await _probes(client):
        for command, script in (("EVAL", _PROBE), ("EVALSHA", digest)):
            await client.execute_command(command, script, 1, key)  # type: ignore[no-untyped-call]


async def _probes(client: Redis) -> Sequence[str]:
    """Return keys to write to for a moment, one on each primary; no tenant's key looks like them."""
    named = map("dmn:check:{{{}}}".format, range(REDIS_CLUSTER_HASH_SLOTS))
    if not isinstance(client, Cluster):
        return [next(named)]
    primaries, _ = await client.nodes()
    keys: dict[Single | None, str] = {}
    while len(keys) < len(primaries) and (key := next(named, None)) is not None:
        keys.setdefault(client.owner_of(key), key)
    return list(keys.values())
