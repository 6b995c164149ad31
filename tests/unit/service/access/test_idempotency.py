"""One answer for one key."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.access.idempotency import Ledger, digest_of
from service.domain.records import Remembered
from service.errors import DeadlineExceeded, IdempotencyConflict, InvalidRequest, StoreAway, StoreDown
from service.stores.in_process import InProcessStore

PATIENCE_S = 60.0


class Work:
    """A call that counts how often it was done."""

    def __init__(self, status: int = 200, digest: str = "d", *, final: bool = True) -> None:
        self.status, self.digest, self.final, self.done = status, digest, final, 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> Remembered:
        self.done += 1
        body = str(self.done).encode()
        await self.gate.wait()
        return Remembered(digest=self.digest, status=self.status, media_type="text/plain", body=body, final=self.final)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(InProcessStore(clock=lambda: 0.0, remember_s=60.0, remember_bytes=10_000))


async def test_a_retry_gets_the_first_answer_and_does_nothing(ledger: Ledger) -> None:
    work = Work(status=201)
    first = await ledger.once("t", "key", "d", work, wait_s=PATIENCE_S)
    assert await ledger.once("t", "key", "d", work, wait_s=PATIENCE_S) == first
    assert work.done == 1


async def test_without_a_key_every_call_is_done(ledger: Ledger) -> None:
    work = Work()
    await ledger.once("t", None, "d", work, wait_s=PATIENCE_S)
    await ledger.once("t", None, "d", work, wait_s=PATIENCE_S)
    assert work.done == 2


async def test_a_key_of_another_request_is_a_conflict_and_nothing_is_done(ledger: Ledger) -> None:
    work = Work()
    await ledger.once("t", "key", "d", work, wait_s=PATIENCE_S)
    with pytest.raises(IdempotencyConflict):
        await ledger.once("t", "key", "other", work, wait_s=PATIENCE_S)
    assert work.done == 1


async def test_tenants_keys_are_their_own(ledger: Ledger) -> None:
    work = Work()
    await ledger.once("a", "key", "d", work, wait_s=PATIENCE_S)
    await ledger.once("b", "key", "other", work, wait_s=PATIENCE_S)
    assert work.done == 2


@pytest.mark.parametrize("status", [300, 404, 422, 503])
async def test_a_failure_is_not_kept(ledger: Ledger, status: int) -> None:
    work = Work(status=status)
    await ledger.once("t", "key", "d", work, wait_s=PATIENCE_S)
    work.status = 200
    assert (await ledger.once("t", "key", "d", work, wait_s=PATIENCE_S)).status == 200
    assert work.done == 2


async def test_an_answer_that_a_retry_may_better_is_not_kept(ledger: Ledger) -> None:
    work = Work(final=False)
    await ledger.once("t", "key", "d", work, wait_s=PATIENCE_S)
    await ledger.once("t", "key", "d", work, wait_s=PATIENCE_S)
    assert work.done == 2


async def test_a_call_that_raises_is_not_kept(ledger: Ledger) -> None:
    async def broken() -> Remembered:
        raise KeyError

    with pytest.raises(KeyError):
        await ledger.once("t", "key", "d", broken, wait_s=PATIENCE_S)
    assert (await ledger.once("t", "key", "d", Work(), wait_s=PATIENCE_S)).status == 200


async def test_calls_with_one_key_at_the_same_time_are_done_once(ledger: Ledger) -> None:
    work = Work()
    work.gate.clear()
    calls = [asyncio.create_task(ledger.once("t", "key", "d", work, wait_s=PATIENCE_S)) for _ in range(5)]
    await asyncio.sleep(0)
    work.gate.set()
    answers = await asyncio.gather(*calls)
    assert work.done == 1
    assert set(answers) == {answers[0]}


async def test_if_the_first_of_them_leaves_the_next_one_does_the_work(ledger: Ledger) -> None:
    work = Work()
    work.gate.clear()
    first, second = (asyncio.create_task(ledger.once("t", "key", "d", work, wait_s=PATIENCE_S)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    work.gate.set()
    assert (await second).body == b"2"
    assert first.cancelled()


async def test_who_cannot_wait_so_long_for_the_first_one_is_told_so_and_does_nothing(ledger: Ledger) -> None:
    work = Work()
    work.gate.clear()
    first = asyncio.create_task(ledger.once("t", "key", "d", work, wait_s=PATIENCE_S))
    await asyncio.sleep(0)
    for wait_s in (0.0, -1.0):
        with pytest.raises(DeadlineExceeded):
            await ledger.once("t", "key", "d", work, wait_s=wait_s)
    work.gate.set()
    assert (await first).body == b"1"
    assert work.done == 1


async def test_no_lock_is_left_for_a_key(ledger: Ledger) -> None:
    await ledger.once("t", "key", "d", Work(), wait_s=PATIENCE_S)
    assert ("t", "key") not in ledger._under_way


@pytest.mark.parametrize("key", ["", "a" * 256, "ä", "a\n", "\x7f", "\0"])
async def test_a_malformed_key_is_refused_and_nothing_is_done(ledger: Ledger, key: str) -> None:
    work = Work()
    with pytest.raises(InvalidRequest):
        await ledger.once("t", key, "d", work, wait_s=PATIENCE_S)
    assert work.done == 0


@pytest.mark.parametrize("key", ["a", "a" * 255, "8e03978e-40d5 43:!~"])
async def test_any_printable_ascii_is_a_key(ledger: Ledger, key: str) -> None:
    await ledger.once("t", key, "d", Work(), wait_s=PATIENCE_S)


class Flaky(InProcessStore):
    """A store that is away for some of its calls."""

    def __init__(self, *away: str) -> None:
        super().__init__(clock=lambda: 0.0, remember_s=60.0, remember_bytes=10_000)
        self.away = set(away)

    async def recall(self, tenant: str, key: str) -> Remembered | None:
        if "recall" in self.away:
            raise StoreAway("away")
        return await super().recall(tenant, key)

    async def remember(self, tenant: str, key: str, answer: Remembered) -> None:
        if "remember" in self.away:
            raise StoreAway("away")
        await super().remember(tenant, key, answer)


async def test_a_call_is_answered_while_the_store_is_away_and_its_answer_is_not_kept() -> None:
    """What repeats it changes nothing: images have their ids."""
    store, work = Flaky("recall", "remember"), Work()
    ledger = Ledger(store)
    assert (await ledger.once("t", "key", "d", work, wait_s=PATIENCE_S)).body == b"1"
    store.away.clear()
    assert (await ledger.once("t", "key", "d", work, wait_s=PATIENCE_S)).body == b"2"
    assert (await ledger.once("t", "key", "d", work, wait_s=PATIENCE_S)).body == b"2"


async def test_an_answer_that_cannot_be_kept_is_given_all_the_same() -> None:
    work = Work()
    assert (await Ledger(Flaky("remember")).once("t", "key", "d", work, wait_s=PATIENCE_S)).body == b"1"


async def test_a_call_that_needs_the_store_is_refused_as_without_a_key() -> None:
    async def needs_it() -> Remembered:
        raise StoreDown("down")

    with pytest.raises(StoreDown):
        await Ledger(Flaky("recall", "remember")).once("t", "key", "d", needs_it, wait_s=PATIENCE_S)


PARTS = st.lists(st.binary(max_size=6) | st.text(max_size=6), max_size=4)


@given(PARTS, PARTS)
@settings(deadline=None)
def test_requests_have_one_digest_exactly_if_their_parts_are_the_same(
    a: list[bytes | str], b: list[bytes | str]
) -> None:
    same = [_bytes(part) for part in a] == [_bytes(part) for part in b]
    assert (digest_of(a) == digest_of(b)) is same


def test_bytes_do_not_move_between_parts_unseen() -> None:
    assert len({digest_of(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""])}) == 4


def _bytes(part: bytes | str) -> bytes:
    return part.encode() if isinstance(part, str) else part
