"""Tenants and their classes: made, changed and removed while running, never half, never one another's."""

from __future__ import annotations

import unicodedata
from typing import Any
from urllib.parse import quote

import pytest

from core.prompts import DEFAULT_TEMPLATES
from tests.support.fakes import picture
from tests.support.house import Build, House, problem

ODD_NAMES = [
    "a/b",
    "/",
    "x/",
    "//x",
    "50 %",
    "50%2F",
    "two words",
    "a?b#c&d=e+f",
    "été",
    "猫",
    "🐈‍⬛",
    "a" * 256,
    "quote\"'`",
    "{}",
    "{0.__class__}",
    "{name}",
    "\u202egpj",
    "back\\slash",
]


async def test_the_default_tenant_exists_at_first_without_classes(build: Build) -> None:
    house = await build()
    answer = await house.client.get("/tenants/default")
    assert answer.json() == {
        "tenant": "default",
        "classes": [],
        "templates": list(DEFAULT_TEMPLATES),
        "slots": 50,
        "beta": 5.5,
        "weights": [1.0, 1.0, 1.0],
        "learn": True,
        "retention": "features",
        "method": "auto",
    }
    memory = await house.memory()
    assert memory["dynamic"] == {"slots": 50, "classes": []}
    assert memory["static"] == {"classes": []}
    assert (memory["bytes"], memory["projections"]) == (0, None)


async def test_a_tenant_is_created_once_and_then_replaced(build: Build) -> None:
    house = await build()
    config = {
        "classes": [{"name": "red", "prompts": ["a red thing"]}, "green"],
        "templates": ["a {}."],
        "slots": 7,
        "beta": 2.0,
        "weights": [1.0, 2.0, 0.5],
        "learn": False,
        "retention": "images",
        "method": "dmn",
    }
    first = await house.client.put("/tenants/shop", json=config)
    again = await house.client.put("/tenants/shop", json=config)
    shown = await house.client.get("/tenants/shop")
    assert (first.status_code, again.status_code) == (201, 200)
    expected = config | {"tenant": "shop"}
    expected["classes"] = [{"name": "red", "prompts": ["a red thing"]}, {"name": "green", "prompts": []}]
    assert first.json() == again.json() == shown.json() == expected


async def test_what_a_put_leaves_out_has_its_default(house: House) -> None:
    await house.put("t", slots=3, beta=1.0, learn=False)
    answer = await house.put("t")
    assert (answer.json()["slots"], answer.json()["beta"], answer.json()["learn"]) == (50, 5.5, True)


GOOD_CONFIGS: list[dict[str, Any]] = [
    {"classes": []},
    {"classes": ["one"]},
    {"slots": 0},
    {"slots": 256},
    {"beta": 0},
    {"beta": 1e300},
    {"beta": 1e-300},
    {"weights": [0, 0, 1]},
    {"weights": [0, 1, 0]},
    {"weights": [1e308, 1e308, 1e308]},
    {"weights": [1e-320, 0, 0]},
    {"templates": [], "classes": [{"name": "red", "prompts": ["red"]}]},
    {"templates": ["{} {} {{}}"]},
    {"templates": ["{} {0} {name} %s"]},
    {"classes": [{"name": "a_b", "prompts": ["same", "same"]}]},
]


@pytest.mark.parametrize("config", GOOD_CONFIGS, ids=str)
async def test_an_allowed_configuration_answers_with_probabilities(house: House, config: dict[str, Any]) -> None:
    assert (await house.put("t", **config)).status_code == 201
    if config.get("classes") == []:
        problem(await house.classify(picture(), tenant="t"), "no-classes")
        return
    for shots in (False, True):
        if shots:
            name = (await house.memory("t"))["dynamic"]["classes"][0]["label"]
            assert (await house.upload(name, picture("red", 9), tenant="t")).status_code == 201
        for one in await house.predictions(picture("red", 1), picture("blue", 2), tenant="t", top_k=10):
            scores = [found["score"] for found in one["top"]]
            assert all(isinstance(score, float) for score in scores), one
            assert sum(scores) == pytest.approx(1.0, abs=1e-4)


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"classes": ["a", "a"]}, "duplicate-class"),
    ({"classes": ["a", {"name": " a ", "prompts": ["x"]}]}, "duplicate-class"),
    ({"classes": ["\u00e9", "e\u0301"]}, "duplicate-class"),
    ({"classes": [""]}, "invalid-request"),
    ({"classes": ["  "]}, "invalid-request"),
    ({"classes": ["a" * 257]}, "invalid-request"),
    ({"classes": ["a\nb"]}, "invalid-request"),
    ({"classes": ["a\x00b"]}, "invalid-request"),
    ({"classes": ["a\x7fb"]}, "invalid-request"),
    ({"classes": ["a\x85b"]}, "invalid-request"),
    ({"classes": [{"prompts": ["x"]}]}, "invalid-request"),
    ({"classes": [{"name": "a", "prompts": [""]}]}, "invalid-request"),
    ({"classes": [{"name": "a", "prompts": "text"}]}, "invalid-request"),
    ({"classes": [{"name": "a", "prompts": ["x" * 257]}]}, "invalid-request"),
    ({"classes": {"a": 1}}, "invalid-request"),
    ({"templates": ["no place"]}, "invalid-request"),
    ({"templates": []}, "invalid-request"),
    ({"templates": ["{}" + "x" * 256]}, "invalid-request"),
    ({"slots": -1}, "invalid-request"),
    ({"slots": 1.5}, "invalid-request"),
    ({"slots": "many"}, "invalid-request"),
    ({"slots": 257}, "limit-exceeded"),
    ({"beta": -1}, "invalid-request"),
    ({"beta": "NaN"}, "invalid-request"),
    ({"weights": [0, 0, 0]}, "invalid-request"),
    ({"weights": [1, 1]}, "invalid-request"),
    ({"weights": [1, 1, -1]}, "invalid-request"),
    ({"weights": [1, 1, 1, 1]}, "invalid-request"),
    ({"retention": "all"}, "invalid-request"),
    ({"learn": "perhaps"}, "invalid-request"),
]


@pytest.mark.parametrize(("config", "slug"), BAD_CONFIGS, ids=lambda value: str(value)[:60])
async def test_a_bad_configuration_neither_creates_nor_changes_a_tenant(
    house: House, config: dict[str, Any], slug: str
) -> None:
    await _refused(house, config, slug)


async def test_a_configuration_beyond_a_limit_neither_creates_nor_changes_a_tenant(build: Build) -> None:
    house = await build(max_classes=8, max_prompts=4)
    for config in (
        {"classes": [f"c{i}" for i in range(9)]},
        {"templates": ["{}"] * 5},
        {"classes": [{"name": "a", "prompts": ["x"] * 5}]},
    ):
        await _refused(house, config, "limit-exceeded")
    assert (await house.put("t", classes=[f"c{i}" for i in range(8)], templates=["{}"] * 4)).status_code == 201


async def _refused(house: House, config: dict[str, Any], slug: str) -> None:
    known = {"templates": ["a {}."]}
    await house.put("old", **known)
    await house.outcomes(picture("red"), tenant="old")
    before = (await house.client.get("/tenants/old")).json(), await house.memory("old"), await house.banks("old")
    for name in ("new", "old"):
        problem(await house.put(name, **(known | config)), slug)
    problem(await house.client.get("/tenants/new"), "unknown-tenant")
    after = (await house.client.get("/tenants/old")).json(), await house.memory("old"), await house.banks("old")
    assert after == before


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_not_finite_are_refused(house: House, number: str) -> None:
    for body in (f'{{"beta": {number}}}', f'{{"weights": [1, {number}, 1]}}', f'{{"slots": {number}}}'):
        headers = {"Content-Type": "application/json"}
        problem(await house.client.put("/tenants/t", content=body, headers=headers), "invalid-request")


@pytest.mark.parametrize("name", ["a b", "-a", ".a", "_a", "a" * 65, "é", "a%", "a\\b", "a:b", "{a}", "a\n", "a\u0660"])
async def test_a_bad_tenant_name_is_refused_everywhere(house: House, name: str) -> None:
    path = f"/tenants/{quote(name)}"
    problem(await house.client.put(path, json={}), "invalid-request")
    problem(await house.client.get(path), "invalid-request")
    problem(await house.client.delete(path), "invalid-request")
    problem(await house.client.post(f"{path}/classes", json={"classes": ["a"]}), "invalid-request")
    problem(await house.client.delete(f"{path}/classes/a"), "invalid-request")


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "9", "a" * 64])
async def test_a_good_tenant_name_is_kept_as_it_is(house: House, name: str) -> None:
    assert (await house.put(name)).json()["tenant"] == name
    assert (await house.memory(name))["tenant"] == name


async def test_an_unknown_tenant_is_told_so_by_every_call(house: House) -> None:
    client, headers = house.client, {"X-Tenant": "nobody"}
    for answer in (
        await client.get("/tenants/nobody"),
        await client.delete("/tenants/nobody"),
        await client.post("/tenants/nobody/classes", json={"classes": ["a"]}),
        await client.delete("/tenants/nobody/classes/a"),
        await client.get("/memory", headers=headers),
        await client.get("/memory/static", headers=headers),
        await client.get("/memory/dynamic/red", headers=headers),
        await client.delete("/memory/dynamic/red/slot", headers=headers),
        await client.delete("/memory/static/shot", headers=headers),
        await client.delete("/memory/static", params={"label": "red"}, headers=headers),
        await client.post("/admin/memory/reset", json={"scope": "all"}, headers=headers),
        await house.classify(picture(), tenant="nobody"),
        await house.upload("red", picture(), tenant="nobody"),
    ):
        problem(answer, "unknown-tenant")
    problem(await client.get("/tenants/nobody"), "unknown-tenant")


async def test_an_unknown_class_is_told_so_by_every_call(house: House) -> None:
    await house.outcomes(picture("red"))
    before = await house.memory()
    for answer in (
        await house.client.delete("/tenants/default/classes/Red"),
        await house.client.get("/memory/dynamic/Red"),
        await house.client.delete("/memory/dynamic/Red/slot"),
        await house.client.delete("/memory/static", params={"label": "Red"}),
        await house.client.post("/admin/memory/reset", json={"scope": "all", "classes": ["red", "Red"]}),
        await house.upload("Red", picture()),
    ):
        problem(answer, "unknown-class")
    assert await house.memory() == before


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_a_class_of_any_name_is_reached_percent_encoded(house: House, name: str) -> None:
    tenant, encoded, headers = "odd", quote(name, safe=""), {"X-Tenant": "odd"}
    assert (await house.put(tenant, classes=[{"name": name, "prompts": ["red"]}, "blue"])).status_code == 201
    assert await house.outcomes(picture("red"), tenant=tenant) == ["filled"]
    (slot,) = await house.slots(name, tenant)
    shot = (await house.upload(name, picture("red", 3), tenant=tenant)).json()["shots"][0]
    assert shot["label"] == name
    assert (await house.client.delete("/memory/static", params={"label": name}, headers=headers)).status_code == 204
    purged = await house.client.delete(f"/memory/dynamic/{encoded}/{slot['slot']}", headers=headers)
    assert purged.status_code == 204, purged.text
    assert await house.slots(name, tenant) == []
    gone = await house.client.delete(f"/tenants/{tenant}/classes/{encoded}")
    assert gone.status_code == 204, gone.text
    assert [one["name"] for one in (await house.client.get(f"/tenants/{tenant}")).json()["classes"]] == ["blue"]


async def test_names_are_compared_in_nfc_and_trimmed(house: House) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    answer = await house.put("t", classes=[f"  {decomposed} ", "b"])
    assert [one["name"] for one in answer.json()["classes"]] == [composed, "b"]
    assert (await house.upload(decomposed, picture(), tenant="t")).json()["shots"][0]["label"] == composed
    assert await house.slots(decomposed, "t") == []
    answer = await house.client.delete(f"/tenants/t/classes/{quote(unicodedata.normalize('NFD', composed))}")
    assert answer.status_code == 204


async def test_a_name_as_long_as_the_setting_allows_works_in_every_call(build: Build) -> None:
    house = await build(max_text_chars=400)
    name = "red " + "x" * 390
    assert (await house.put(classes=[name, "blue"])).status_code == 200
    assert (await house.upload(name, picture())).status_code == 201
    assert (await house.client.get(f"/memory/dynamic/{quote(name)}")).status_code == 200
    await house.reset("all", classes=[name])
    assert (await house.client.delete("/memory/static", params={"label": name})).status_code == 204
    assert (await house.client.delete(f"/tenants/default/classes/{quote(name)}")).status_code == 204


async def test_adding_a_class_keeps_the_slots_and_shots_of_the_others(house: House) -> None:
    await house.outcomes(*[picture(colour, seed) for colour in ("red", "green", "blue") for seed in range(3)])
    await house.upload("red", picture("red", 50))
    banks, shots, before = await house.banks(), await house.shots(), await house.memory()
    answer = await house.client.post("/tenants/default/classes", json={"classes": ["white", {"name": "yellow"}]})
    assert answer.status_code == 201
    assert [one["name"] for one in answer.json()["classes"]] == ["red", "green", "blue", "white", "yellow"]
    after = await house.memory()
    assert after["epoch"] > before["epoch"]
    assert after["version"] > before["version"]
    assert after["bytes"] == before["bytes"]
    told = await house.banks()
    assert {name: {one["slot"] for one in told[name]} for name in banks} == {
        name: {one["slot"] for one in bank} for name, bank in banks.items()
    }
    assert (told["white"], told["yellow"]) == ([], [])
    assert await house.shots() == shots


async def test_removing_a_class_drops_its_own_slots_and_shots_only(house: House) -> None:
    await house.outcomes(*[picture(colour, seed) for colour in ("red", "green", "blue") for seed in range(3)])
    for name in ("red", "green"):
        await house.upload(name, picture(name, 50))
    banks = await house.banks()
    assert (await house.client.delete("/tenants/default/classes/green")).status_code == 204
    told = await house.banks()
    assert list(told) == ["red", "blue"]
    for name, bank in told.items():
        assert {one["slot"] for one in bank} == {one["slot"] for one in banks[name]}
    assert [one["label"] for one in await house.shots()] == ["red"]
    await house.client.post("/tenants/default/classes", json={"classes": ["green"]})
    assert await house.slots("green") == []
    assert [one["label"] for one in await house.shots()] == ["red"]


async def test_reordering_classes_changes_nothing_but_the_order(house: House) -> None:
    await house.outcomes(*[picture(colour, seed) for colour in ("red", "green", "blue") for seed in range(3)])
    await house.upload("red", picture("red", 50))
    banks, shots = await house.banks(), await house.shots()
    (before,) = await house.predictions(picture("green", 77), learn=False)
    await house.put(classes=["blue", "red", "green"])
    assert await house.banks() == banks
    assert await house.shots() == shots
    (after,) = await house.predictions(picture("green", 77), learn=False)
    assert after["label"] == before["label"]
    assert after["score"] == pytest.approx(before["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("body", "slug"),
    [
        ({"classes": []}, "invalid-request"),
        ({}, "invalid-request"),
        ({"classes": ["red"]}, "duplicate-class"),
        ({"classes": ["new", "new"]}, "duplicate-class"),
        ({"classes": ["new", ""]}, "invalid-request"),
        ({"classes": ["a", "b", "c"]}, "limit-exceeded"),
        ({"classes": [{"name": "new", "prompts": ["x"] * 8}]}, "limit-exceeded"),
    ],
    ids=str,
)
async def test_classes_that_cannot_be_added_leave_all_as_it_was(build: Build, body: dict[str, Any], slug: str) -> None:
    house = await build(max_classes=5, max_prompts=7)
    await house.put()
    await house.outcomes(picture("red"))
    before = await house.memory(), await house.banks(), (await house.client.get("/tenants/default")).json()
    problem(await house.client.post("/tenants/default/classes", json=body), slug)
    assert (await house.memory(), await house.banks(), (await house.client.get("/tenants/default")).json()) == before


async def test_a_tenant_replaced_with_fewer_slots_keeps_the_best(house: House) -> None:
    await house.outcomes(*[picture("red", seed) for seed in range(6)], *[picture("blue", seed) for seed in range(2)])
    banks = await house.banks()
    await house.put(slots=3)
    assert await house.banks() == {name: bank[:3] for name, bank in banks.items()}
    assert (await house.memory())["dynamic"]["slots"] == 3
    await house.put(slots=100)
    assert await house.banks() == {name: bank[:3] for name, bank in banks.items()}
    await house.put(slots=0)
    assert not any((await house.banks()).values())


async def test_weights_and_beta_change_answers_and_no_memory(house: House) -> None:
    await house.outcomes(*[picture(colour, seed) for colour in ("red", "blue") for seed in range(4)])
    banks = await house.banks()
    (first,) = await house.predictions(picture("blue", 50), learn=False)
    await house.put(beta=1.0, weights=[1.0, 0.0, 0.0])
    (second,) = await house.predictions(picture("blue", 50), learn=False)
    assert await house.banks() == banks
    assert second["score"] == pytest.approx(second["readouts"]["text"]["score"], abs=1e-6)
    assert first["readouts"]["text"] == second["readouts"]["text"]


async def test_new_prompts_score_the_stored_slots_anew(house: House) -> None:
    await house.outcomes(*[picture("red", seed) for seed in range(3)])
    banks = await house.banks()
    await house.put(classes=[{"name": "red", "prompts": ["a blue thing"]}, "green", "blue"])
    told = await house.banks()
    before, after = ({one["slot"] for own in bank.values() for one in own} for bank in (banks, told))
    assert after == before
    assert told != banks
    await house.put()
    again = await house.banks()
    for name, bank in banks.items():
        assert [one["slot"] for one in again[name]] == [one["slot"] for one in bank]
        assert [one["entropy"] for one in again[name]] == pytest.approx([one["entropy"] for one in bank], abs=1e-3)


async def test_a_deleted_tenant_is_gone_and_comes_back_empty(house: House) -> None:
    await house.put("t")
    await house.outcomes(picture("red"), tenant="t")
    await house.upload("red", picture("red", 2), tenant="t")
    epoch = (await house.memory("t"))["epoch"]
    assert (await house.client.delete("/tenants/t")).status_code == 204
    problem(await house.client.delete("/tenants/t"), "unknown-tenant")
    problem(await house.classify(picture(), tenant="t"), "unknown-tenant")
    await house.put("t")
    memory = await house.memory("t")
    assert memory["bytes"] == 0
    assert memory["epoch"] > epoch


async def test_the_default_tenant_comes_back_without_classes(house: House) -> None:
    await house.outcomes(picture("red"))
    assert (await house.client.delete("/tenants/default")).status_code == 204
    assert (await house.client.get("/tenants/default")).json()["classes"] == []
    problem(await house.classify(picture()), "no-classes")


async def test_tenants_are_listed_by_name_page_by_page(house: House) -> None:
    names = sorted(["default", "Z", "a.b", "a", *(f"t{i:02}" for i in range(8))])
    for name in names[::-1]:
        await house.put(name)
    whole = (await house.client.get("/tenants")).json()
    assert whole == {"items": [{"tenant": name} for name in names], "next": None}
    for limit in (1, 5, 11, 12):
        found: list[str] = []
        query: dict[str, Any] = {"limit": limit}
        while True:
            page = (await house.client.get("/tenants", params=query)).json()
            assert len(page["items"]) <= limit
            found += [one["tenant"] for one in page["items"]]
            if page["next"] is None:
                break
            query["cursor"] = page["next"]
        assert found == names


@pytest.mark.parametrize("path", ["/tenants", "/memory/static", "/memory/dynamic/red"])
@pytest.mark.parametrize(
    "query",
    [
        {"limit": 0},
        {"limit": 1001},
        {"limit": "x"},
        {"cursor": "!"},
        {"cursor": "é"},
        {"cursor": "/w=="},
        {"cursor": "a"},
        {"cursor": "_w=="},
    ],
    ids=str,
)
async def test_a_bad_page_is_refused(house: House, path: str, query: dict[str, Any]) -> None:
    problem(await house.client.get(path, params=query), "invalid-request")


async def test_no_more_tenants_than_the_limit(build: Build) -> None:
    house = await build(max_tenants=3)
    for name in ("a", "b"):
        assert (await house.put(name)).status_code == 201
    problem(await house.put("c"), "limit-exceeded")
    problem(await house.client.get("/tenants/c"), "unknown-tenant")
    assert (await house.put("a", slots=3)).status_code == 200
    await house.client.delete("/tenants/b")
    assert (await house.put("c")).status_code == 201
