"""Who calls, for which tenant, and what it may do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from service.access.api_keys import Scope, claimed_tenant, hash_of, id_of, new_key
from service.access.authentication import Caller, Gate, named_tenant
from service.access.key_cache import FRESH_S
from service.domain.records import StoredKey, tenant_of_key
from service.errors import Forbidden, InvalidRequest, StoreDown, Unauthenticated
from service.settings import DEFAULT_TENANT


@pytest.mark.parametrize(
    ("header", "query", "tenant"),
    [
        (None, None, DEFAULT_TENANT),
        ("a", None, "a"),
        (None, "b", "b"),
        ("a", "a", "a"),
    ],
)
def test_a_caller_names_its_tenant_by_header_or_query_or_is_the_default(
    header: str | None, query: str | None, tenant: str
) -> None:
    assert named_tenant(header, query) == tenant


def test_a_caller_that_names_no_tenant_is_its_keys() -> None:
    assert named_tenant(None, None, "own") == "own"
    assert named_tenant("a", None, "own") == "a"


@pytest.mark.parametrize(("header", "query"), [("a", "b"), ("a", ""), ("", "a"), ("a", "A")])
def test_a_caller_that_names_two_tenants_is_refused(header: str, query: str) -> None:
    with pytest.raises(InvalidRequest, match="different tenants"):
        named_tenant(header, query)


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "ä", "a" * 65, "a\n", "..", "{a}"])
def test_a_malformed_name_is_refused_wherever_it_stands(name: str) -> None:
    for header, query in ((name, None), (None, name), (name, name)):
        with pytest.raises(InvalidRequest):
            named_tenant(header, query)


# Keys -----------------------------------------------------------------------------------------------------------------

OPERATOR_KEY = "correct-horse-battery-staple"
TENANTS = ("zoo", "a", "a_b", "x.y-z_", "A" * 64, "")


class Shelf:
    """Where keys are kept: it notes what it is asked, and says what it is told to."""

    def __init__(self) -> None:
        self.held: dict[str, StoredKey] = {}
        self.asked: list[list[str]] = []
        self.fault: Exception | None = None
        self.gate, self.reached = asyncio.Event(), asyncio.Event()
        self.gate.set()

    def new(self, tenant: str = "zoo", *scopes: str, expires: float | None = None) -> str:
        """Keep a new key, and return it."""
        key, id_ = new_key(tenant)
        self.held[id_] = StoredKey(
            id=id_, digest=hash_of(key), scopes=scopes or ("classify",), created=0.0, expires=expires
        )
        return key

    async def find(self, ids: Sequence[str]) -> Sequence[StoredKey | StoreDown | None]:
        self.asked.append(list(ids))
        self.reached.set()
        found = [self.held.get(id_) for id_ in ids]
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return found


class Watch:
    """A gate before a shelf, and the time there."""

    def __init__(self) -> None:
        self.now, self.wall = 100.0, 5000.0
        self.shelf = Shelf()
        self.gate = Gate(self.shelf.find, clock=lambda: self.now, wall=lambda: self.wall, operator_key=OPERATOR_KEY)

    async def admit(self, key: str, scope: Scope = Scope.CLASSIFY) -> Caller:
        async with asyncio.timeout(60):
            return await self.gate.admit([f"Bearer {key}"], scope)

    async def refusal(self, *authorization: str, scope: Scope = Scope.CLASSIFY) -> str:
        with pytest.raises(Unauthenticated) as error:
            await self.gate.admit(authorization, scope)
        return error.value.detail


@pytest.fixture
async def watch() -> AsyncIterator[Watch]:
    made = Watch()
    yield made
    await made.gate.aclose()


@pytest.mark.parametrize("tenant", TENANTS)
def test_a_new_key_says_whose_it_is_and_is_as_hard_to_guess_as_a_key_should_be(tenant: str) -> None:
    made = [new_key(tenant) for _ in range(100)]
    assert len({key for key, _ in made}) == len({id_ for _, id_ in made}) == 100
    for key, id_ in made:
        assert id_of(key) == id_
        assert tenant_of_key(id_) == tenant
        assert claimed_tenant(f"Bearer {key}") == tenant
        secret = key.removeprefix(f"dmn_{id_}_")
        assert len(bytes.fromhex(secret)) * 8 >= 128
        assert secret not in hash_of(key)


@pytest.mark.parametrize(
    "text",
    ["", "dmn_", "dmn__", OPERATOR_KEY, f"dmn_zoo_{'0' * 11}_{'0' * 48}", f"dmn_-_{'0' * 12}_{'0' * 48}", "dmn_a_b_c"],
)
def test_what_is_no_key_of_ours_has_no_id(text: str) -> None:
    assert id_of(text) is None
    assert claimed_tenant(f"Bearer {text}") == ""


@pytest.mark.parametrize("tenant", TENANTS)
async def test_a_key_lets_in_its_tenant_with_its_scopes(watch: Watch, tenant: str) -> None:
    key = watch.shelf.new(tenant, "classify", "memory")
    caller = await watch.admit(key)
    assert (caller.tenant, caller.scopes, caller.operates) == (tenant, {"classify", "memory"}, False)
    assert await watch.admit(key, Scope.MEMORY) == caller
    with pytest.raises(Forbidden, match="'admin'"):
        await watch.admit(key, Scope.ADMIN)


@pytest.mark.parametrize("scope", Scope)
async def test_an_operator_may_do_everything_by_the_key_of_the_settings_or_one_that_is_kept(
    watch: Watch, scope: Scope
) -> None:
    for key in (OPERATOR_KEY, watch.shelf.new("", "operator")):
        caller = await watch.admit(key, scope)
        assert (caller.tenant, caller.operates) == ("", True)
        caller.speak_for(["anyone", "else"])
    assert len(watch.shelf.asked) == 1


async def test_a_caller_speaks_for_its_own_tenant_alone(watch: Watch) -> None:
    caller = await watch.admit(watch.shelf.new("zoo"))
    caller.speak_for([])
    caller.speak_for(["zoo", "zoo"])
    for named in (["a"], ["zoo", "a"], ["Zoo"], [""], ["zoo "], ["no/name"]):
        with pytest.raises(Forbidden) as error:
            caller.speak_for(named)
        assert error.value.detail == "The API key is not for the tenant that the call names."


@pytest.mark.parametrize(
    "authorization",
    [
        ["Bearer"],
        ["Bearer "],
        ["KEY"],
        ["Basic KEY"],
        ["BearerKEY"],
        ["Bearer KEY KEY"],
        ["Bearer KEY, Bearer KEY"],
        ["Bearer KEY", "Bearer KEY"],
        ["Bearer KE\u00e9Y"],
        ["Bearer " + "x" * 513],
        [""],
    ],
)
async def test_a_malformed_header_is_refused_even_with_a_key_that_is_valid(
    watch: Watch, authorization: list[str]
) -> None:
    told = [one.replace("KEY", OPERATOR_KEY) for one in authorization]
    assert "malformed" in await watch.refusal(*told)
    assert "needs an API key" in await watch.refusal()
    assert not watch.shelf.asked


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER   {}", "Bearer {} "])
async def test_the_scheme_has_no_case(watch: Watch, form: str) -> None:
    assert await watch.gate.admit([form.format(OPERATOR_KEY)], Scope.ADMIN)


async def test_every_key_that_is_not_valid_is_refused_by_the_same_words(watch: Watch) -> None:
    revoked, expired, other = watch.shelf.new(), watch.shelf.new(expires=watch.wall), watch.shelf.new("a")
    del watch.shelf.held[id_of(revoked) or ""]
    wrong = other[:-1] + ("0" if other[-1] != "0" else "1")
    mixed = f"dmn_{id_of(watch.shelf.new())}_{other[-48:]}"
    bad = [revoked, expired, wrong, mixed, new_key("zoo")[0], new_key("")[0], "nonsense", OPERATOR_KEY + "x"]
    told = {await watch.refusal(f"Bearer {key}") for key in bad * 2}
    assert told == {"The API key is not valid."}
    await watch.admit(other)


async def test_a_key_expires_at_its_moment(watch: Watch) -> None:
    key = watch.shelf.new(expires=watch.wall + 10)
    watch.wall += 9.999
    await watch.admit(key)
    watch.wall += 0.001
    await watch.refusal(f"Bearer {key}")


async def test_keys_of_a_tenant_are_valid_beside_each_other_each_for_its_own_time(watch: Watch) -> None:
    old, new = watch.shelf.new(expires=watch.wall + 10), watch.shelf.new()
    for key in (old, new):
        await watch.admit(key)
    watch.wall += 10
    await watch.refusal(f"Bearer {old}")
    await watch.admit(new)


async def test_a_revoked_key_is_refused_within_a_second(watch: Watch) -> None:
    key = watch.shelf.new()
    await watch.admit(key)
    watch.shelf.held.clear()
    await watch.admit(key)
    watch.now += 1.0
    await watch.refusal(f"Bearer {key}")


async def test_a_key_is_looked_up_once_while_what_is_known_of_it_is_fresh(watch: Watch) -> None:
    key, wrong = watch.shelf.new(), new_key("zoo")[0]
    for _ in range(5):
        await watch.admit(key)
        await watch.refusal(f"Bearer {wrong}")
        watch.now += FRESH_S / 5
    assert len(watch.shelf.asked) == 2
    watch.now += FRESH_S
    await watch.admit(key)
    assert len(watch.shelf.asked) == 3


async def test_a_new_key_opens_although_it_was_tried_before_it_was_made(watch: Watch) -> None:
    key = watch.shelf.new()
    kept, watch.shelf.held = watch.shelf.held, {}
    await watch.refusal(f"Bearer {key}")
    watch.shelf.held = kept
    watch.now += 1.0
    await watch.admit(key)


async def test_who_comes_during_a_lookup_is_told_of_what_changed_since_it_began(watch: Watch) -> None:
    key = watch.shelf.new()
    watch.shelf.gate.clear()
    first = asyncio.create_task(watch.admit(key))
    await watch.shelf.reached.wait()
    watch.shelf.held.clear()
    second = asyncio.create_task(watch.admit(key))
    await asyncio.sleep(0)
    watch.shelf.gate.set()
    await first
    with pytest.raises(Unauthenticated):
        await second


async def test_a_flood_of_wrong_keys_asks_the_store_one_thing_at_a_time_and_leaves_little_behind(watch: Watch) -> None:
    keyring = watch.gate._keyring
    key, wrong = watch.shelf.new(), [new_key("zoo")[0] for _ in range(12_000)]
    flood = [asyncio.create_task(watch.admit(one)) for one in wrong]
    good = asyncio.create_task(watch.admit(key))
    told = await asyncio.gather(*flood, return_exceptions=True)
    assert all(isinstance(one, Unauthenticated) for one in told)
    assert (await good).tenant == "zoo"
    assert len(watch.shelf.asked) < 100
    assert len(keyring) == 10_000
    watch.now += 1.0
    await watch.admit(key)
    assert len(keyring) == 1


async def test_a_key_that_cannot_be_looked_up_is_told_so_and_looked_up_again(watch: Watch) -> None:
    key = watch.shelf.new()
    await watch.admit(key)
    watch.now += 1.0
    watch.shelf.fault = StoreDown("The store does not answer.", retry_after_s=2.0)
    for _ in range(2):
        with pytest.raises(StoreDown):
            await watch.admit(key)
    await watch.admit(OPERATOR_KEY)
    watch.shelf.fault = None
    await watch.admit(key)


async def test_of_a_store_whose_nodes_are_partly_away_the_others_keys_are_found(watch: Watch) -> None:
    near, far = watch.shelf.new("near"), watch.shelf.new("far")
    watch.shelf.held[id_of(far) or ""] = StoreDown("The node is away.")  # type: ignore[assignment]
    told = await asyncio.gather(watch.admit(near), watch.admit(far), return_exceptions=True)
    assert isinstance(told[0], Caller)
    assert isinstance(told[1], StoreDown)


async def test_who_gives_up_waiting_takes_nothing_from_the_others(watch: Watch) -> None:
    key = watch.shelf.new()
    watch.shelf.gate.clear()
    first, second = (asyncio.create_task(watch.admit(key)) for _ in range(2))
    await watch.shelf.reached.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    watch.shelf.gate.set()
    assert (await second).tenant == "zoo"


async def test_a_gate_that_closes_lets_nobody_wait_for_ever(watch: Watch) -> None:
    watch.shelf.gate.clear()
    waiting = [asyncio.create_task(watch.admit(watch.shelf.new())) for _ in range(300)]
    await watch.shelf.reached.wait()
    await watch.gate.aclose()
    told = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in told)


async def test_without_an_operators_key_nothing_stands_for_it(watch: Watch) -> None:
    gate = Gate(watch.shelf.find, clock=lambda: watch.now, wall=lambda: watch.wall)
    for text in ("x", hash_of(""), "None"):
        with pytest.raises(Unauthenticated):
            await gate.admit([f"Bearer {text}"], Scope.CLASSIFY)
