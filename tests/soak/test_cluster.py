"""Memories on a cluster of three primaries and three replicas that is taken apart under load.

A tenant's slot is moved key by key, or at once; a primary is killed, or held as if its network were gone, or killed
while its replica is behind. Workers push candidates meanwhile whose right outcome is known. The short run does each to
one primary, the long one to all of them in turn, again and again, and there the tenant is served again in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

import pytest

from service.domain.memory import Stamp
from service.domain.records import SnapshotInfo
from tests.soak.cluster import FINGERPRINT, NODE_TIMEOUT_MS, TIMEOUT_S, Load, judge, key_of, load, tenants_on
from tests.soak.report import tell
from tests.support.process import PATIENCE_S, until
from tests.support.servers import BINARIES, Cluster, Node, cluster

pytestmark = pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed")

ROUNDS = {"short": 1, "long": 3}
SOON_S = 2 * TIMEOUT_S + 6 * NODE_TIMEOUT_MS / 1000
"""Until the service goes on after a loss: a call may wait out its timeout twice, and a replica takes over in time."""

_BALLAST, _PART = 32, 1 << 20


@pytest.fixture(scope="module")
def whole() -> Iterator[Cluster]:
    """Run one cluster for all tests here."""
    options = ("--appendonly", "yes")
    with cluster(str(BINARIES["valkey"]), replicas=1, node_timeout_ms=NODE_TIMEOUT_MS, more=options) as own:
        yield own


# Strikes --------------------------------------------------------------------------------------------------------------


async def move_key_by_key(whole: Cluster, work: Load, tenant: str) -> float:
    """Move a tenant's slot in the classic way; between its steps workers meet what is half moved."""
    source = whole.owner(key_of(tenant))
    for step, _ in enumerate(whole.move_key_by_key(key_of(tenant), _another(whole, source))):
        if step % 3 == 0:
            await work.meets(tenant)
    assert whole.keys_in(source, key_of(tenant)) == 0, "keys stayed behind"
    return await work.goes_on(tenant)


async def move_at_once(whole: Cluster, work: Load, tenant: str) -> float:
    """Move a tenant's slot in the atomic way, with so much in it that it takes some time."""
    await _ballast(work, tenant)
    target = _another(whole, whole.owner(key_of(tenant)))
    whole.move_at_once(key_of(tenant), target)
    await _taken_over(whole, tenant, target)
    return await work.goes_on(tenant)


async def kill_primary(whole: Cluster, work: Load, tenant: str) -> float:
    """End the primary of a tenant as a power cut would."""
    whole.owner(key_of(tenant)).kill()
    return await work.goes_on(tenant)


async def hold_primary(whole: Cluster, work: Load, tenant: str) -> float:
    """Let the primary of a tenant fall silent, its connections open, until others go on without it."""
    primary = whole.owner(key_of(tenant))
    primary.hold()
    back = await work.goes_on(tenant)
    primary.release()
    await asyncio.to_thread(whole.heal)
    await work.goes_on(tenant)
    return back


async def kill_ahead(whole: Cluster, work: Load, tenant: str) -> float:
    """End the primary of a tenant after its replica lost touch with it: what the replica had not is gone.

    Some workers go on at once; one looks again only when the new primary has counted as many changes, but others.
    """
    primary = whole.owner(key_of(tenant))
    replica = whole.replica_of(primary)
    # What was sent to a held replica waits in its socket; what comes after the link was cut it never sees.
    replica.hold()
    primary.call("CLIENT", "KILL", "TYPE", "REPLICA")
    await work.push_surest(tenant)
    await work.goes_on(tenant)
    await work.look_away(tenant)
    primary.kill()
    replica.release()
    back = await work.goes_on(tenant)
    await work.overtakes(tenant)
    return back


async def _ballast(work: Load, tenant: str) -> None:
    """Give the slot of a tenant more to move: parts of a snapshot that nobody reads."""
    info = SnapshotInfo(
        id="ballast",
        created=0.0,
        reason="manual",
        fingerprint=FINGERPRINT,
        stamp=Stamp(epoch=1, version=0),
        classes=0,
        slots=0,
        shots=0,
        bytes=_BALLAST * _PART,
    )
    assert await work.stores[0].keep_snapshot(tenant, info, (bytes(_PART) for _ in range(_BALLAST)))


async def _taken_over(whole: Cluster, tenant: str, node: Node) -> None:
    """Return once a node says itself that it has a tenant's slot."""
    own = key_of(tenant)
    await asyncio.to_thread(until, "the slot changes hands", lambda: whole.owner(own, seen_by=node) is node)


def _another(whole: Cluster, node: Node) -> Node:
    return next(one.node for one in whole.members() if one.primary and one.node is not node)


STRIKES: Mapping[str, tuple[Callable[[Cluster, Load, str], Coroutine[Any, Any, float]], bool]] = {
    "move key by key": (move_key_by_key, True),
    "move at once": (move_at_once, True),
    "kill primary": (kill_primary, False),
    "hold primary": (hold_primary, False),
    "kill ahead of replica": (kill_ahead, False),
}
"""What is done to a cluster, and whether every node survives it."""


# Laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRIKES)
async def test_a_cluster_that_is_taken_apart_loses_nothing_that_it_promised(
    whole: Cluster, name: str, scale: str
) -> None:
    """A move costs nothing; a lost primary nothing that its replica had, and no worker believes otherwise."""
    if name == "move at once" and not whole.moves_at_once():
        pytest.skip("this server moves slots only key by key")
    for number in range(ROUNDS[scale]):
        for turn, node in enumerate(_primaries(whole)[: 1 if scale == "short" else None]):
            back_s = await _strike(whole, name, node, f"{name.replace(' ', '-')}-{number}-{turn}")
            assert scale == "short" or back_s < SOON_S
            await asyncio.to_thread(whole.heal)


async def _strike(whole: Cluster, name: str, node: Node, prefix: str) -> float:
    """Do one thing to a tenant on a primary, while tenants on all are at work; return when it was served again."""
    act, survived = STRIKES[name]
    primaries = [node, *(one for one in _primaries(whole) if one is not node)]
    tenants = [next(iter(tenants_on(whole, one, f"{prefix}-{at}-"))) for at, one in enumerate(primaries)]
    timeout_s = PATIENCE_S if survived else TIMEOUT_S
    async with load(whole, tenants, witnessed=not survived, timeout_s=timeout_s) as work:
        await work.goes_on(tenants[0])
        back_s = await act(whole, work, tenants[0])
        await work.finish()
        found = [await judge(work, tenant, survived=survived) for tenant in tenants]
    tell(f"cluster, {name}", {"back_s": round(back_s, 2), "tenants": [vars(one) for one in found]})
    assert not [one for one in found if one.broken]
    assert all(one.acknowledged for one in found)
    assert whole.owner(key_of(tenants[0])) is not node
    if survived:
        assert whole.keys_in(node, key_of(tenants[0])) == 0
        assert not any(one.refused for one in found[1:]), "tenants of other slots were refused"
    else:
        assert all(one.replicated for one in found)
    if name == "kill ahead of replica":
        assert found[0].unsure > 0, "nothing was lost, so nothing was shown"
    return back_s


def _primaries(whole: Cluster) -> list[Node]:
    return [member.node for member in whole.members() if member.primary]
