"""Keys at every route: who is let in, for whom, and that a refusal tells nothing."""

from __future__ import annotations

import importlib
import itertools
import logging
import pkgutil
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi.routing import APIRoute, APIRouter

from service import api
from service.access.api_keys import Scope, hash_of, new_key
from service.api.security import NEEDS, Guarded
from service.domain.records import StoredKey
from service.errors import StoreDown
from service.stores.in_process import InProcessStore
from service.stores.protocol import MemoryStore
from service.telemetry import logs
from tests.support.fakes import picture
from tests.support.house import Build, House, RawCall, SoftEncoder, opened, problem

OPERATOR_KEY = "correct-horse-battery-staple"
SHOP = "shop"

CLASSIFY, MEMORY, ADMIN, METRICS, OPERATOR = "classify", "memory", "admin", "metrics", "operator"
NEEDED: dict[tuple[str, str], str | None] = {
    ("POST", "/classify"): CLASSIFY,
    ("GET", "/memory"): MEMORY,
    ("GET", "/memory/dynamic/red"): MEMORY,
    ("DELETE", "/memory/dynamic/red/none"): MEMORY,
    ("GET", "/memory/static"): MEMORY,
    ("POST", "/memory/static"): MEMORY,
    ("DELETE", "/memory/static"): MEMORY,
    ("DELETE", "/memory/static/none"): MEMORY,
    ("POST", "/memory/static/train"): MEMORY,
    ("DELETE", "/memory/static/train"): MEMORY,
    ("GET", "/jobs"): MEMORY,
    ("GET", "/jobs/none"): MEMORY,
    ("DELETE", "/jobs/none"): MEMORY,
    ("PUT", f"/tenants/{SHOP}"): ADMIN,
    ("GET", f"/tenants/{SHOP}"): ADMIN,
    ("DELETE", f"/tenants/{SHOP}"): ADMIN,
    ("POST", f"/tenants/{SHOP}/classes"): ADMIN,
    ("DELETE", f"/tenants/{SHOP}/classes/red"): ADMIN,
    ("POST", "/admin/memory/reset"): ADMIN,
    ("GET", "/admin/memory/snapshots"): ADMIN,
    ("POST", "/admin/memory/snapshots"): ADMIN,
    ("GET", "/admin/memory/snapshots/none"): ADMIN,
    ("DELETE", "/admin/memory/snapshots/none"): ADMIN,
    ("POST", "/admin/memory/snapshots/none/restore"): ADMIN,
    ("GET", "/admin/memory/export"): ADMIN,
    ("POST", "/admin/memory/import"): ADMIN,
    ("GET", "/admin/memory/migration"): ADMIN,
    ("POST", "/admin/memory/migration"): ADMIN,
    ("DELETE", "/admin/memory/migration"): ADMIN,
    ("GET", "/metrics"): METRICS,
    ("GET", "/tenants"): OPERATOR,
    ("GET", "/livez"): None,
    ("GET", "/readyz"): None,
    ("GET", "/version"): None,
    ("GET", "/problems/internal"): None,
    ("GET", "/openapi.json"): None,
    ("GET", "/docs"): None,
}
"""Every route of the service, by a call to it, and the scope that it needs."""

BODIES: dict[str, Any] = {
    "/classify": {"content": picture("red"), "headers": {"Content-Type": "image/png"}},
    f"/tenants/{SHOP}": {"json": {"classes": ["red", "green"]}},
    f"/tenants/{SHOP}/classes": {"json": {"classes": ["blue"]}},
    "/admin/memory/reset": {"json": {"scope": "dynamic"}},
}
GUARDED = [call for call, scope in NEEDED.items() if scope is not None]
OPEN = [call for call, scope in NEEDED.items() if scope is None]


async def issue(house: House, tenant: str, *scopes: str, expires: float | None = None) -> str:
    """Make a key, as the command does."""
    key, id_ = new_key(tenant)
    kept = StoredKey(id=id_, digest=hash_of(key), scopes=scopes, created=0.0, expires=expires)
    assert await house.rooms.store.keep_key(kept)
    return key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def call(house: House, method: str, path: str, key: str | None = None, **more: Any) -> httpx.Response:
    """Make a call that is well-formed, with a key or without."""
    given = BODIES.get(path, {}) if method in ("POST", "PUT") else {}
    headers = given.get("headers", {}) | ({} if key is None else bearer(key)) | more.pop("headers", {})
    return await house.client.request(method, path, **(given | more | {"headers": headers}))


def let_in(answer: httpx.Response) -> bool:
    assert answer.status_code < 500, answer.text
    return answer.status_code not in {401, 403}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def locked_house() -> AsyncIterator[House]:
    async with opened(SoftEncoder(), auth="keys", operator_key=OPERATOR_KEY) as house:
        yield house


@pytest_asyncio.fixture(loop_scope="session")
async def locked(locked_house: House) -> House:
    """Return a house that asks for keys, with the tenants `shop` and `other`."""
    for tenant in (SHOP, "other"):
        answer = await locked_house.client.put(
            f"/tenants/{tenant}", json={"classes": ["red", "green"]}, headers=bearer(OPERATOR_KEY)
        )
        assert answer.status_code in {200, 201}
    return locked_house


# Routes and scopes ----------------------------------------------------------------------------------------------------


def routers() -> list[APIRouter]:
    modules = (importlib.import_module(one.name) for one in pkgutil.walk_packages(api.__path__, f"{api.__name__}."))
    return [module.router for module in modules if isinstance(getattr(module, "router", None), APIRouter)]


def test_no_route_is_made_without_saying_what_it_needs() -> None:
    made = [route for router in routers() for route in router.routes]
    assert all(type(route) is Guarded for route in made)
    assert {route.path for route in made if isinstance(route, APIRoute)} == set(NEEDS)
    with pytest.raises(KeyError):
        APIRouter(route_class=Guarded).add_api_route("/new", lambda: "nobody said who may")


async def test_every_route_is_in_the_matrix(locked: House) -> None:
    (served,) = [route for route in locked.app.routes if getattr(route, "path", "") == "/openapi.json"]
    assert type(served).__name__ == "Route"  # the only one that is not ours
    paths = (await locked.client.get("/openapi.json")).json()["paths"]
    documented = {(method.upper(), path) for path, item in paths.items() for method in item}
    assert len(documented) == len(NEEDED) - len(("/openapi.json", "/docs"))
    for method, path in documented:
        example = path.replace("{tenant}", SHOP).replace("{name}", "red").replace("{slug}", "internal")
        for name in ("{slot}", "{shot}", "{job}", "{snapshot}"):
            example = example.replace(name, "none")
        assert (method, example) in NEEDED


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_a_key_opens_the_routes_of_its_scopes_alone(locked: House, method: str, path: str, scope: str) -> None:
    key = await issue(locked, "" if scope == OPERATOR else SHOP, scope)
    named = {"headers": {"X-Tenant": SHOP}} if scope == OPERATOR else {}
    answer = await call(locked, method, path, key, **named)
    if scope in (NEEDED[method, path], OPERATOR):
        assert let_in(answer), answer.text
    else:
        told = problem(answer, "forbidden")
        assert f"'{NEEDED[method, path]}'" in told["detail"]


@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_no_route_opens_without_a_valid_key(locked: House, method: str, path: str) -> None:
    every = await issue(locked, SHOP, CLASSIFY, MEMORY, ADMIN, METRICS, expires=1.0)
    for authorization in (None, "", "Bearer", "Basic c2hvcDpzaG9w", f"Bearer {every}", "Bearer nonsense", OPERATOR_KEY):
        headers = {} if authorization is None else {"Authorization": authorization}
        answer = await call(locked, method, path, headers=headers)
        told = problem(answer, "unauthenticated")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "nonsense" not in told["detail"]


@pytest.mark.parametrize(("method", "path"), OPEN)
@pytest.mark.parametrize("key", [None, "nonsense"])
async def test_probes_and_documents_need_no_key(locked: House, method: str, path: str, key: str | None) -> None:
    assert (await call(locked, method, path, key)).status_code == 200


async def test_nothing_of_a_body_is_read_before_the_key_was_looked_at(locked: House) -> None:
    for path, scope in (("/classify", MEMORY), ("/memory/static", CLASSIFY), ("/admin/memory/reset", CLASSIFY)):
        for key, status in ((await issue(locked, SHOP, scope), 403), ("nonsense", 401)):
            headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
            raw = RawCall(locked.app, path, body=[b"{" * 1000] * 3, headers=headers, leaves=True)
            await raw.run()
            assert raw.status == status


# Tenants --------------------------------------------------------------------------------------------------------------


async def test_an_operator_speaks_for_whom_it_names_or_the_default_tenant(locked: House) -> None:
    for key in (OPERATOR_KEY, await issue(locked, "", OPERATOR)):
        assert (await call(locked, "GET", "/memory", key)).json()["tenant"] == "default"
        assert (await call(locked, "GET", "/memory", key, params={"tenant": "other"})).json()["tenant"] == "other"
        answer = await call(locked, "POST", "/classify", key, headers={"X-Tenant": "other"})
        assert answer.json()["tenant"] == "other"
        problem(await call(locked, "GET", "/memory", key, headers={"X-Tenant": "nobody"}), "unknown-tenant")


Naming = Callable[[str], dict[str, Any]]
NAMINGS: dict[str, Naming] = {
    "header": lambda name: {"headers": [("X-Tenant", name)]},
    "query": lambda name: {"params": [("tenant", name)]},
    "both": lambda name: {"headers": [("X-Tenant", name)], "params": [("tenant", name)]},
    "header beside its own": lambda name: {"headers": [("X-Tenant", SHOP), ("X-Tenant", name)]},
    "header before its own": lambda name: {"headers": [("X-Tenant", name), ("X-Tenant", SHOP)]},
    "query beside its own": lambda name: {"params": [("tenant", SHOP), ("tenant", name)]},
    "query before its own": lambda name: {"params": [("tenant", name), ("tenant", SHOP)]},
}
OTHERS = ("other", "nobody", "default", "SHOP", "", "no/name", "x" * 100)
"""One that is there, some that are not, and some that could not be."""


@pytest.mark.parametrize(("method", "path"), [call for call in GUARDED if NEEDED[call] != OPERATOR])
async def test_another_tenant_is_refused_wherever_it_is_named_and_whether_it_is_there_or_not(
    locked: House, method: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await issue(locked, SHOP, CLASSIFY, MEMORY, ADMIN, METRICS)
    only_keys(monkeypatch, locked.rooms.store)
    told = set()
    for naming, name in itertools.product(NAMINGS.values(), OTHERS):
        more = naming(name)
        headers = [("Authorization", f"Bearer {key}"), *more.pop("headers", [])]
        answer = await locked.client.request(method, path, headers=headers, **more)
        told.add(said(answer))
    if SHOP in path:
        for name in ("other", "nobody", "default", "SHOP", "no%20name"):
            answer = await locked.client.request(method, path.replace(SHOP, name), headers=bearer(key))
            told.add(said(answer))
    assert len(told) == 1


async def test_the_wrong_scope_and_the_wrong_tenant_together_tell_nothing_either(locked: House) -> None:
    key = await issue(locked, SHOP, CLASSIFY)
    told = {said(await call(locked, "GET", f"/tenants/{name}", key)) for name in ("other", "nobody", SHOP)}
    assert len(told) == 1


def only_keys(monkeypatch: pytest.MonkeyPatch, store: MemoryStore) -> None:
    """Let the store be asked about keys, and about nothing else."""

    async def never(*_: object, **__: object) -> None:
        raise AssertionError("something else than a key was looked up")

    for name in (name for name in vars(MemoryStore) if not name.startswith("_") and name != "find_keys"):
        monkeypatch.setattr(store, name, never, raising=False)


def said(answer: httpx.Response) -> str:
    """Return all that a refusal says, but for the request's id."""
    told = problem(answer, "forbidden")
    headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
    return str((told | {"request_id": ""}, headers))


async def test_a_key_with_the_scope_admin_makes_its_own_tenant_and_no_other(locked: House) -> None:
    key = await issue(locked, "founder", ADMIN)
    body = {"json": {"classes": ["red"]}, "headers": bearer(key)}
    problem(await locked.client.put("/tenants/another", **body), "forbidden")
    assert (await locked.client.put("/tenants/founder", **body)).status_code == 201
    assert (await locked.client.get("/tenants/founder", headers=bearer(key))).json()["tenant"] == "founder"
    assert (await locked.client.delete("/tenants/founder", headers=bearer(key))).status_code == 204


async def test_the_keys_of_a_deleted_tenant_open_nothing_any_more(build: Build) -> None:
    house = await build(auth="keys", operator_key=OPERATOR_KEY)
    for tenant in ("gone", "default"):
        await house.client.put(f"/tenants/{tenant}", json={"classes": ["red"]}, headers=bearer(OPERATOR_KEY))
        admin, other = await issue(house, tenant, ADMIN), await issue(house, tenant, CLASSIFY)
        assert (await house.client.delete(f"/tenants/{tenant}", headers=bearer(admin))).status_code == 204
        await house.client.put(f"/tenants/{tenant}", json={"classes": ["red"]}, headers=bearer(OPERATOR_KEY))
        problem(await call(house, "POST", "/classify", other), "unauthenticated")
        assert await house.rooms.store.keys(tenant) == []


async def test_what_a_tenant_may_look_at_is_its_own(locked: House) -> None:
    await locked.client.post("/admin/memory/snapshots", headers=bearer(OPERATOR_KEY) | {"X-Tenant": "other"})
    key = await issue(locked, SHOP, MEMORY, ADMIN)
    for path in ("/jobs", "/admin/memory/snapshots", "/memory", "/memory/static", f"/tenants/{SHOP}"):
        assert "other" not in (await call(locked, "GET", path, key)).text


# The store is away ----------------------------------------------------------------------------------------------------


async def test_a_key_that_cannot_be_looked_up_is_no_valid_key_and_no_wrong_one(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = False

    def while_there(op: str) -> Callable[..., Any]:
        real = getattr(InProcessStore, op)

        async def asked(*args: Any, **more: Any) -> Any:
            if away:
                raise StoreDown("The store does not answer.", retry_after_s=2.0)
            return await real(*args, **more)

        return asked

    for op in ("find_keys", "ping", "stamps"):
        monkeypatch.setattr(InProcessStore, op, while_there(op))
    house = await build(auth="keys", operator_key=OPERATOR_KEY)
    await house.client.put(f"/tenants/{SHOP}", json={"classes": ["red"]}, headers=bearer(OPERATOR_KEY))
    key = await issue(house, SHOP, CLASSIFY)
    assert let_in(await call(house, "POST", "/classify", OPERATOR_KEY, headers={"X-Tenant": SHOP}))
    assert (await house.client.get("/readyz")).json()["ready"]
    away = True
    answer = await call(house, "POST", "/classify", key)
    problem(answer, "store-down")
    assert answer.headers["retry-after"] == "2"
    assert let_in(await call(house, "POST", "/classify", OPERATOR_KEY, headers={"X-Tenant": SHOP}))
    assert (await house.client.get("/readyz")).status_code == 503


# Told nowhere ---------------------------------------------------------------------------------------------------------


async def test_no_key_stands_in_a_log_an_answer_or_a_metric(locked: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    kept = await locked.rooms.store.keys()
    keys = [OPERATOR_KEY, await issue(locked, SHOP, CLASSIFY), new_key(SHOP)[0], "such-a-key-is-not-there"]
    told = []
    for key, (method, path) in itertools.product(keys, GUARDED):
        for authorization in (f"Bearer {key}", f"Basic {key}", key):
            answer = await call(locked, method, path, headers={"Authorization": authorization})
            told.append(answer.text + str(answer.headers))
    told += [str(record.__dict__) for record in caplog.records]
    told += [(await call(locked, "GET", "/metrics", OPERATOR_KEY)).text]
    assert any(logs.REQUEST in one for one in told)
    for text in told:
        assert not any(key in text or hash_of(key) in text for key in keys)
    assert not any(key in repr(kept) for key in keys)


async def test_refusals_are_counted_by_their_problem(build: Build) -> None:
    house = await build(auth="keys", operator_key=OPERATOR_KEY)
    key = await issue(house, SHOP, CLASSIFY)
    for _ in range(3):
        await call(house, "GET", "/memory")
    for _ in range(2):
        await call(house, "GET", "/memory", key)
    text = (await call(house, "GET", "/metrics", OPERATOR_KEY)).text
    assert 'dmn_rejected_total{reason="unauthenticated"} 3.0' in text
    assert 'dmn_rejected_total{reason="forbidden"} 2.0' in text


# What the document says, and the mode without keys --------------------------------------------------------------------


async def test_the_document_names_the_scheme_and_what_each_route_needs(locked: House) -> None:
    for _ in range(2):
        told = (await locked.client.get("/openapi.json")).json()
        scheme = told["components"]["securitySchemes"]["key"]
        assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
        assert told["paths"]["/classify"]["post"]["security"] == [{"key": ["classify"]}]
        assert told["paths"]["/memory/dynamic/{name}/{slot}"]["delete"]["security"] == [{"key": ["memory"]}]
        assert "security" not in told["paths"]["/livez"]["get"]


async def test_without_keys_nobody_is_asked_for_one(house: House) -> None:
    for headers in ({}, bearer("nonsense"), {"Authorization": "nonsense"}):
        assert let_in(await house.client.get("/tenants", headers=headers))
        assert let_in(await call(house, "POST", "/classify", headers=headers))
    told = (await house.client.get("/openapi.json")).json()
    assert "key" in told["components"]["securitySchemes"]
    assert not any("security" in operation for item in told["paths"].values() for operation in item.values())


async def test_a_house_without_any_key_says_how_to_make_the_first(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    def hints() -> list[Any]:
        return [record.fields["how"] for record in caplog.records if record.message == logs.NO_KEYS]  # type: ignore[attr-defined]

    await build(auth="keys", operator_key=OPERATOR_KEY)
    assert not hints()
    house = await build(auth="keys")
    (how,) = hints()
    assert "DMN_OPERATOR_KEY" in how
    problem(await call(house, "GET", "/memory"), "unauthenticated")
    assert (await house.client.get("/readyz")).status_code == 200
