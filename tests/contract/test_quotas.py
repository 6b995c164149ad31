"""What every store keeps to when it lets images in: the bucket of a tenant, and the leases of its images at work.

Redis goes by its own clock, which no test can set: rates are so low that no token comes back within a minute, or the
times before and after each call bound what the store may answer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.quotas import Allowance, Lease, Quota
from service.stores.protocol import MemoryStore
from service.stores.token_bucket import NEARLY, OwnLimits
from tests.contract.conftest import Opened, Row

SLOW = 1e-3
"""Tokens a second: none comes back while a test runs."""

LONG_S, SHORT_S = 600.0, 0.05
PATIENCE_S = 60.0
CLOCKS_S = 2e-3
"""Largest difference between a server's clock, which counts leases in milliseconds, and the one of this process."""

_IDS = count()


def lease(images: int = 1) -> Lease:
    return Lease(id=f"call-{next(_IDS)}", images=images)


async def ask(
    store: MemoryStore,
    quota: Quota,
    images: int = 1,
    *,
    under: Lease | None = None,
    lasts_s: float = LONG_S,
    over: Sequence[Lease] = (),
    tenant: str = "zoo",
) -> Allowance:
    return await store.admit(tenant, quota, images, under or lease(images), lasts_s=lasts_s, over=over)


async def until(opened: Opened, told: Callable[[], Awaitable[bool]], step_s: float = 0.01) -> None:
    """Ask until it is so; a store that goes by the test's clock sees time pass between the questions."""
    async with asyncio.timeout(PATIENCE_S):
        while not await told():
            opened.later(step_s)


# The bucket -----------------------------------------------------------------------------------------------------------


async def test_as_many_as_the_bucket_holds_are_let_in_at_once_and_no_more(store: MemoryStore) -> None:
    quota = Quota(rate=SLOW, burst=5)
    told = [await ask(store, quota) for _ in range(8)]
    assert [one.let_in for one in told] == [True] * 5 + [False] * 3
    assert [round(one.tokens) for one in told] == [4, 3, 2, 1, 0, 0, 0, 0]


async def test_a_call_takes_a_token_for_each_of_its_images(store: MemoryStore) -> None:
    quota = Quota(rate=SLOW, burst=5)
    assert [(await ask(store, quota, images)).let_in for images in (3, 3, 2, 1)] == [True, False, True, False]


async def test_who_is_refused_is_told_when_there_are_tokens_enough(store: MemoryStore) -> None:
    quota = Quota(rate=SLOW, burst=4)
    assert (await ask(store, quota, 4)).wait_s == 0
    assert (await ask(store, quota, 1)).wait_s == pytest.approx(1 / SLOW, abs=PATIENCE_S)
    assert (await ask(store, quota, 3)).wait_s == pytest.approx(3 / SLOW, abs=PATIENCE_S)


async def test_who_waits_as_long_as_told_is_let_in(opened: Opened) -> None:
    quota, started, due = Quota(rate=40.0, burst=4), opened.now(), math.inf
    assert (await ask(opened.store, quota, 4)).let_in

    async def let_in() -> bool:
        nonlocal due
        asked = opened.now()
        reply = await ask(opened.store, quota, 3)
        assert reply.let_in or asked < due
        due = min(due, opened.now() + reply.wait_s + CLOCKS_S)
        return reply.let_in

    await until(opened, let_in, step_s=0.005)
    assert opened.now() - started >= 3 / quota.rate - CLOCKS_S


async def test_a_refused_call_spends_nothing(store: MemoryStore) -> None:
    quota = Quota(rate=SLOW, burst=5, concurrent=4)
    held = lease(3)
    assert (await ask(store, quota, 3, under=held)).let_in
    for _ in range(20):
        told = await ask(store, quota, 2)
        assert (told.crowded, told.wait_s) == (True, 0.0)
        assert (await ask(store, quota, 5, under=lease(1))).wait_s > 0
    assert (await ask(store, quota, 1)).let_in
    await store.release("zoo", [held])
    assert (await ask(store, quota, 1)).let_in
    assert not (await ask(store, quota, 1)).let_in


async def test_without_a_limit_everybody_is_let_in(store: MemoryStore) -> None:
    for quota in (Quota(), Quota(rate=SLOW, burst=1000), Quota(concurrent=1000)):
        for _ in range(20):
            assert (await ask(store, quota, 10)).let_in


async def test_what_was_saved_up_under_a_larger_quota_does_not_count_under_a_smaller_one(store: MemoryStore) -> None:
    assert (await ask(store, Quota(rate=SLOW, burst=100))).let_in
    smaller = Quota(rate=SLOW, burst=2)
    assert [(await ask(store, smaller)).let_in for _ in range(3)] == [True, True, False]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Images that were let in some time between two moments."""

    images: int
    asked: float
    told: float


def check_law(entries: Sequence[Entry], quota: Quota) -> None:
    """Check that over any window no more than burst + rate t images were let in."""
    for first in entries:
        for last in entries:
            inside = [one for one in entries if one.asked >= first.asked and one.told <= last.told]
            if inside:
                most = quota.burst + quota.rate * (last.told - first.asked)
                assert sum(one.images for one in inside) <= most + 1e-3


async def test_over_any_window_no_more_are_let_in_than_the_burst_and_what_comes_back_whoever_asks(
    opened: Opened,
) -> None:
    """Two replicas with several callers each ask as fast as they can, and pause until the bucket is full again."""
    quota = Quota(rate=200.0, burst=7)
    entries: list[Entry] = []
    started = opened.now()

    def now() -> float:
        opened.later(0.001)
        return opened.now() - started

    async def hammer(store: MemoryStore, random: Random, enough: int) -> None:
        while sum(one.images for one in entries) < enough:
            images, asked = random.randint(1, 4), now()
            told = await ask(store, quota, images)
            if told.let_in:
                entries.append(Entry(images=images, asked=asked, told=now()))
            await asyncio.sleep(0)

    async def full() -> bool:
        asked = now()
        told = await ask(opened.store, quota, quota.burst)
        if told.let_in:
            entries.append(Entry(images=quota.burst, asked=asked, told=now()))
        return told.let_in

    async with asyncio.timeout(PATIENCE_S):
        for enough in (40, 80, 120):
            stores = (opened.store, opened.replica)
            await asyncio.gather(*(hammer(stores[i % 2], Random(i), enough) for i in range(6)))
            await until(opened, full)
    check_law(entries, quota)


# Leases ---------------------------------------------------------------------------------------------------------------


async def test_no_more_are_at_work_at_a_time_than_may_be_whoever_asks(opened: Opened) -> None:
    quota, held = Quota(concurrent=5), [lease(2), lease(2), lease(1)]
    for store, own in zip((opened.store, opened.replica, opened.store), held, strict=True):
        assert (await ask(store, quota, own.images, under=own)).let_in
    for store in (opened.store, opened.replica):
        told = await ask(store, quota, 1)
        assert (told.let_in, told.crowded, told.held) == (False, True, 5)
    await opened.replica.release("zoo", held[:1])
    assert (await ask(opened.store, quota, 2)).held == 5


async def test_what_is_given_back_twice_makes_room_once(store: MemoryStore) -> None:
    quota, held = Quota(concurrent=4), lease(2)
    assert (await ask(store, quota, 2, under=held)).let_in
    assert (await ask(store, quota, 2)).let_in
    for _ in range(3):
        await store.release("zoo", [held, held])
    assert (await ask(store, quota, 2, over=[held])).let_in
    assert not (await ask(store, quota, 1)).let_in


async def test_what_is_over_makes_room_in_the_same_breath(store: MemoryStore) -> None:
    quota, held = Quota(concurrent=2), lease(2)
    assert (await ask(store, quota, 2, under=held)).let_in
    assert not (await ask(store, quota, 2)).let_in
    assert (await ask(store, quota, 2, over=[held])).let_in


async def test_a_call_that_is_repeated_because_its_answer_was_lost_is_let_in_and_charged_once(
    store: MemoryStore,
) -> None:
    quota, held = Quota(rate=SLOW, burst=4, concurrent=3), lease(3)
    told = [await ask(store, quota, 3, under=held) for _ in range(3)]
    assert [(one.let_in, round(one.tokens), one.held) for one in told] == [(True, 1, 3)] * 3
    await store.release("zoo", [held])
    assert (await ask(store, quota, 1)).held == 1


async def test_the_lease_of_one_who_was_killed_is_free_after_its_lifetime(opened: Opened) -> None:
    quota, started = Quota(concurrent=3), opened.now()
    assert (await ask(opened.replica, quota, 3, lasts_s=SHORT_S)).let_in
    refused: list[Allowance] = []

    async def free() -> bool:
        told = await ask(opened.store, quota, 3)
        refused.extend([] if told.let_in else [told])
        return told.let_in

    await until(opened, free)
    assert opened.now() - started >= SHORT_S - CLOCKS_S
    assert all(one.crowded for one in refused)
    assert (await ask(opened.store, quota, 1)).held == 3


async def test_a_lease_lasts_as_long_as_it_is_renewed(opened: Opened) -> None:
    """Others end one after the other meanwhile, as many as would be several of its own lifetimes.

    Where a lifetime passes between two renewals, as on a machine that stands still, another tenant begins anew.
    """
    quota, lasts_s = Quota(concurrent=3), 4 * SHORT_S
    long, renewed, ended, tenants = lease(2), -math.inf, 0, (f"zoo-{number}" for number in count())
    tenant = "none"

    async def some_ended() -> bool:
        nonlocal renewed, ended, tenant
        last, renewed = renewed, opened.now()
        await opened.replica.renew(tenant, [long, lease()], lasts_s=lasts_s)
        reply = await ask(opened.store, quota, 1, lasts_s=lasts_s, tenant=tenant)
        if opened.now() - last < lasts_s - CLOCKS_S:
            assert reply.held == 3
            ended += reply.let_in
        else:
            tenant, ended = next(tenants), 0
            await ask(opened.store, quota, 2, under=long, lasts_s=lasts_s, tenant=tenant)
        return ended == 5

    await until(opened, some_ended)


async def test_a_lease_that_has_ended_is_not_renewed(opened: Opened) -> None:
    quota, late = Quota(concurrent=1), lease()
    assert (await ask(opened.store, quota, under=late, lasts_s=SHORT_S)).let_in
    ended = Lease(id="witness", images=1)

    async def over() -> bool:
        return (await ask(opened.store, Quota(concurrent=1), under=ended)).let_in

    await until(opened, over)
    await opened.store.renew("zoo", [late], lasts_s=LONG_S)
    await opened.store.release("zoo", [ended])
    assert (await ask(opened.store, quota)).let_in


async def test_tenants_do_not_touch_each_others(store: MemoryStore) -> None:
    quota, held = Quota(rate=SLOW, burst=2, concurrent=2), lease(2)
    assert (await ask(store, quota, 2, under=held)).let_in
    assert not (await ask(store, quota)).let_in
    assert (await ask(store, quota, 2, tenant="farm")).let_in
    await store.release("farm", [held])
    await store.renew("farm", [held], lasts_s=SHORT_S)
    assert (await ask(store, quota, tenant="zoo")).held == 2


async def test_who_asks_for_nothing_of_it_changes_nothing(store: MemoryStore) -> None:
    """Quotas are no part of a tenant: it need not be there, and its memory does not hear of them."""
    await store.renew("zoo", [lease()], lasts_s=1.0)
    await store.release("zoo", [lease()])
    assert (await ask(store, Quota(rate=1.0, burst=1, concurrent=1))).let_in
    assert await store.get("zoo") is None
    assert list(await store.names(after="", limit=10)) == []


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("ask", "ask", "ask", "release", "renew")),
        st.sampled_from(("zoo", "farm")),
        st.integers(1, 6),
        st.integers(0, 7),
    ),
    max_size=30,
)


@given(steps=STEPS, burst=st.integers(1, 12), concurrent=st.integers(0, 8), unlimited=st.booleans())
@settings(max_examples=30)
async def test_every_store_decides_alike(
    row: Row, steps: list[tuple[str, str, int, int]], burst: int, concurrent: int, *, unlimited: bool
) -> None:
    quota = Quota(rate=0.0 if unlimited else SLOW, burst=burst, concurrent=concurrent)
    model = OwnLimits(lambda: 0.0)
    async with row.open(60.0, 100) as opened:
        for what, tenant, images, number in steps:
            own = Lease(id=str(number), images=images)
            if what == "ask":
                told = await opened.store.admit(tenant, quota, images, own, lasts_s=LONG_S, over=())
                known = model.admit(tenant, quota, images, own, lasts_s=LONG_S, over=())
                assert (told.let_in, told.crowded, told.held) == (known.let_in, known.crowded, known.held)
                assert told.tokens == pytest.approx(known.tokens, abs=SLOW * PATIENCE_S)
            elif what == "release":
                await opened.store.release(tenant, [own])
                model.release(tenant, [own])
            else:
                await opened.store.renew(tenant, [own], lasts_s=LONG_S)
                model.renew(tenant, [own], lasts_s=LONG_S)


@given(
    rate=st.floats(1e-3, 1e4),
    burst=st.integers(1, 1000),
    asks=st.lists(st.tuples(st.floats(-5.0, 100.0), st.integers(1, 50)), min_size=1, max_size=40),
)
@settings(max_examples=200)
def test_the_bucket_never_lets_in_more_whatever_the_clock_does(
    rate: float, burst: int, asks: list[tuple[float, int]]
) -> None:
    """A clock that is set back brings no tokens, and does not keep anybody out for long."""
    now, quota = 1e8, Quota(rate=rate, burst=burst)
    own = OwnLimits(lambda: now)
    passed, spent = 0.0, [(0.0, 0)]
    for seconds, images in asks:
        now += seconds
        passed += max(0.0, seconds)
        told = own.admit("zoo", quota, images, lease(images), lasts_s=1.0, over=())
        assert -NEARLY <= told.tokens <= burst
        if told.let_in:
            spent.append((passed, spent[-1][1] + images))
        elif images <= burst:
            now += told.wait_s
            passed += told.wait_s
            assert own.admit("zoo", quota, images, lease(images), lasts_s=1.0, over=()).let_in
            spent.append((passed, spent[-1][1] + images))
    for at, (since, before) in enumerate(spent[1:]):
        for until_, after in spent[at + 1 :]:
            assert after - spent[at][1] <= burst + rate * (until_ - since) + 2 * NEARLY, (before, after)
