"""What traffic teaches, and what it must not: the dynamic memory as callers see it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.fakes import picture
from tests.support.house import House, Json, problem

COLOURS = ("red", "green", "blue")


def _stream(count: int = 34) -> list[bytes]:
    """Return pictures of three colours, some of them twice."""
    pictures = [picture(COLOURS[i % 3], i) for i in range(count - 4)]
    return [*pictures, *pictures[3:7]]


def _close(one: Any, other: Any) -> bool:
    """Whether two answers are the same, numbers within 1e-5."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_close(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_close, one, other))
    return bool(one == pytest.approx(other, abs=1e-5)) if isinstance(one, float) else bool(one == other)


async def test_a_prediction_says_what_the_surface_promises(house: House) -> None:
    answer = (await house.classify(picture("red"))).json()
    assert list(answer) == ["tenant", "model", "predictions", "memory"]
    assert (answer["tenant"], answer["model"]) == ("default", "fake")
    assert answer["memory"].keys() == {"version", "epoch", "state"}
    assert answer["memory"]["state"] == "fresh"
    (one,) = answer["predictions"]
    assert list(one) == ["label", "score", "top", "readouts", "learned", "explain", "error"]
    assert one["top"][0] == {"label": one["label"], "score": one["score"]}
    assert one["label"] == "red"
    assert sum(found["score"] for found in one["top"]) == pytest.approx(1)
    assert list(one["readouts"]) == ["text", "dynamic", "static", "statistics"]
    assert one["readouts"]["static"] is None
    assert one["readouts"]["statistics"]["label"] == "red"
    assert list(one["learned"]) == ["outcome", "label", "entropy", "slot", "evicted"]
    assert (one["explain"], one["error"]) == (None, None)
    (slot,) = await house.slots("red")
    assert slot["slot"] == one["learned"]["slot"]
    assert slot["entropy"] == pytest.approx(one["learned"]["entropy"], abs=1e-6)


async def test_the_stamp_of_an_answer_is_the_memorys(house: House) -> None:
    for images in ([picture("red", 1)], [picture("red", 1)], [picture("red", 2), picture("blue", 3)]):
        stamp = (await house.classify(*images)).json()["memory"]
        memory = await house.memory()
        assert (stamp["version"], stamp["epoch"]) == (memory["version"], memory["epoch"])


async def test_outcomes_are_filled_then_replaced_or_rejected_and_duplicate(house: House) -> None:
    await house.put(slots=2)
    red = [picture("red", seed) for seed in range(12)]
    order = {one["learned"]["slot"] or i: i for i, one in enumerate(await house.predictions(*red, learn=False))}
    assert len(order) == 12
    entropies = [one["learned"]["entropy"] for one in await house.predictions(*red, learn=False)]
    best_first = sorted(range(12), key=lambda i: entropies[i])
    worst, better, best, other = (red[best_first[i]] for i in (9, 6, 0, 4))
    filled = await house.predictions(worst, better)
    assert [one["learned"]["outcome"] for one in filled] == ["filled", "filled"]
    (replaced,) = await house.predictions(best)
    assert replaced["learned"]["outcome"] == "replaced"
    assert replaced["learned"]["evicted"] == filled[0]["learned"]["slot"]
    before = await house.memory()
    (rejected,) = await house.predictions(worst)
    assert (rejected["learned"]["outcome"], rejected["learned"]["slot"]) == ("rejected", None)
    (again,) = await house.predictions(best)
    assert (again["learned"]["outcome"], again["learned"]["slot"]) == ("duplicate", replaced["learned"]["slot"])
    assert await house.memory() == before
    assert await house.outcomes(other) == ["replaced"]


async def test_the_largest_entropy_of_a_full_class_never_rises(house: House) -> None:
    await house.put(slots=3)
    worst = float("inf")
    for seed in range(12):
        await house.predictions(picture("red", seed))
        (red, *_) = (await house.memory())["dynamic"]["classes"]
        assert red["entropies"] == sorted(red["entropies"])
        if red["count"] == 3:
            assert red["entropies"][-1] <= worst
            worst = red["entropies"][-1]


async def test_a_read_only_call_changes_nothing_and_gets_the_answer_of_a_learning_one(house: House) -> None:
    await house.put(slots=2)
    await house.upload("green", picture("green", 99))
    outcomes = set()
    for image in _stream(18):
        before = await house.memory(), await house.banks()
        (looked,) = await house.predictions(image, learn=False)
        assert (await house.memory(), await house.banks()) == before
        (learned,) = await house.predictions(image)
        assert looked["learned"]["outcome"] == "skipped"
        for one in (looked, learned):
            outcomes.add(one.pop("learned")["outcome"])
        assert _close(looked, learned)
    assert outcomes == {"skipped", "filled", "replaced", "rejected", "duplicate"}


async def test_calls_of_1_3_and_32_images_give_the_same_answers_and_memory(house: House) -> None:
    images = _stream()
    found: dict[int, tuple[list[Json], Json, dict[str, list[Json]]]] = {}
    for size in (1, 3, 32):
        tenant = f"by-{size}"
        await house.put(tenant, slots=6)
        await house.upload("red", picture("red", 900), tenant=tenant)
        told = []
        for start in range(0, len(images), size):
            told += await house.predictions(*images[start : start + size], tenant=tenant, explain=True)
        memory = await house.memory(tenant)
        # A repeat whose last bits are lower is kept in place of the first: that counts as a change, and is none.
        del memory["tenant"], memory["epoch"], memory["version"]
        found[size] = told, memory, await house.banks(tenant)
    assert {one["learned"]["outcome"] for one in found[1][0]} == {"filled", "replaced", "rejected", "duplicate"}
    assert _close(list(found[1]), list(found[3]))
    assert _close(list(found[1]), list(found[32]))


async def test_calls_at_once_learn_what_calls_in_a_row_do(house: House) -> None:
    images = _stream()
    await house.put("row", slots=4)
    await house.put("crowd", slots=4)
    await house.predictions(*images, tenant="row")
    await asyncio.gather(*(house.predictions(image, tenant="crowd") for image in images))
    assert _close(await house.banks("crowd"), await house.banks("row"))


async def test_changes_under_traffic_never_fail_a_call(house: House) -> None:
    images = _stream(24)

    async def change() -> None:
        for i in range(6):
            await house.put(classes=[*COLOURS, f"white {i}"])
            await house.reset("all")
            await house.upload("red", picture("red", 700 + i))

    answers, *_ = await asyncio.gather(asyncio.gather(*(house.classify(image) for image in images)), change())
    assert [answer.status_code for answer in answers] == [200] * len(images)
    memory, banks = await house.memory(), await house.banks()
    assert {one["label"]: one["count"] for one in memory["dynamic"]["classes"]} == {
        name: len(bank) for name, bank in banks.items()
    }


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 10_000])
async def test_top_k_names_so_many_classes_and_no_more_than_there_are(house: House, top_k: int) -> None:
    (one,) = await house.predictions(picture("blue"), top_k=top_k)
    assert len(one["top"]) == min(top_k, 3)
    assert [found["score"] for found in one["top"]] == sorted((found["score"] for found in one["top"]), reverse=True)
    assert one["top"][0]["label"] == "blue"


async def test_five_classes_are_named_unless_said_otherwise(house: House) -> None:
    await house.put(classes=[f"class {i}" for i in range(9)])
    (one,) = await house.predictions(picture())
    assert len({found["label"] for found in one["top"]}) == 5


async def test_one_class_takes_everything(house: House) -> None:
    await house.put(classes=["all"])
    (one,) = await house.predictions(picture())
    assert (one["label"], one["score"]) == ("all", pytest.approx(1))
    assert one["learned"]["entropy"] == pytest.approx(0, abs=1e-6)


async def test_an_explanation_names_the_strongest_slots_and_shots(house: House) -> None:
    await house.upload("red", *[picture("red", seed) for seed in range(100, 105)])
    await house.predictions(*[picture("red", seed) for seed in range(5)], picture("blue", 1))
    held = {one["slot"]: one["entropy"] for one in await house.slots("red")}
    shots = {one["id"] for one in await house.shots()}
    (one,) = await house.predictions(picture("red", 2), learn=False, explain=True)
    told = one["explain"]
    assert list(told) == ["dynamic", "static"]
    assert [found.keys() for found in told["dynamic"]] == [{"label", "slot", "affinity", "entropy"}] * 3
    assert [found.keys() for found in told["static"]] == [{"label", "shot", "affinity"}] * 3
    for found in (told["dynamic"], told["static"]):
        strength = [trace["affinity"] for trace in found]
        assert strength == sorted(strength, reverse=True)
        assert all(0 < value <= 1.0001 for value in strength)
    assert told["dynamic"][0]["affinity"] == pytest.approx(1, abs=1e-3)
    assert held.items() >= {(trace["slot"], trace["entropy"]) for trace in told["dynamic"]}
    assert {trace["shot"] for trace in told["static"]} <= shots


async def test_there_is_nothing_to_explain_with_before_anything_is_known(house: House) -> None:
    (one,) = await house.predictions(picture(), learn=False, explain=True)
    assert one["explain"] == {"dynamic": [], "static": []}


async def test_more_views_ask_the_encoder_more_and_repeat_exactly(house: House) -> None:
    encoder: Any = house.rooms.encoder
    before = encoder.images
    (first,) = await house.predictions(picture("red"), views=8, learn=False)
    assert encoder.images - before == 8
    (again,) = await house.predictions(picture("red"), views=8, learn=False)
    assert _close(first, again)
    (plain,) = await house.predictions(picture("red"), learn=False)
    assert first["readouts"]["text"] == pytest.approx(plain["readouts"]["text"], abs=1e-5)
    assert first["learned"]["entropy"] != plain["learned"]["entropy"]


async def test_a_reset_empties_what_it_names_and_starts_a_new_epoch(house: House) -> None:
    async def fill() -> Json:
        await house.predictions(*[picture(colour, seed, size=(8, 8)) for colour in COLOURS for seed in range(2)])
        for colour in COLOURS:
            await house.upload(colour, picture(colour, 50))
        return await house.memory()

    def counts(memory: Json) -> tuple[list[int], list[int]]:
        return tuple([one["count"] for one in memory[kind]["classes"]] for kind in ("dynamic", "static"))  # type: ignore[return-value]

    for scope, classes, expected in (
        ("dynamic", None, ([0, 0, 0], [1, 1, 1])),
        ("static", None, ([2, 2, 2], [0, 0, 0])),
        ("all", None, ([0, 0, 0], [0, 0, 0])),
        ("dynamic", ["red", "blue"], ([0, 2, 0], [1, 1, 1])),
        ("static", ["green"], ([2, 2, 2], [1, 0, 1])),
        ("all", ["green", "green"], ([2, 0, 2], [1, 0, 1])),
        ("all", [], ([2, 2, 2], [1, 1, 1])),
    ):
        before = await fill()
        assert counts(before) == ([2, 2, 2], [1, 1, 1])
        stamp = await house.reset(scope, classes=classes)
        after = await house.memory()
        assert counts(after) == expected, (scope, classes)
        assert (stamp["epoch"], stamp["version"]) == (after["epoch"], after["version"])
        assert after["epoch"] > before["epoch"]
        assert after["version"] > before["version"]


async def test_after_a_reset_the_answer_is_as_on_the_first_day(house: House) -> None:
    (first,) = await house.predictions(picture("red", 1), learn=False)
    await house.predictions(*_stream(20))
    await house.upload("red", picture("red", 50))
    await house.reset("all")
    (again,) = await house.predictions(picture("red", 1), learn=False)
    assert _close(again, first)


@pytest.mark.parametrize(
    "body", [{}, {"scope": "everything"}, {"scope": "all", "classes": "red"}, {"scope": "all", "classes": [1]}], ids=str
)
async def test_a_reset_of_no_sense_empties_nothing(house: House, body: Json) -> None:
    await house.predictions(picture("red"))
    before = await house.memory()
    problem(await house.client.post("/admin/memory/reset", json=body), "invalid-request")
    assert await house.memory() == before


async def test_a_purge_removes_one_slot_and_its_image_stays_away_until_a_reset(house: House) -> None:
    images = [picture("red", seed) for seed in range(3)]
    slots = [one["learned"]["slot"] for one in await house.predictions(*images)]
    answer = await house.client.delete(f"/memory/dynamic/red/{slots[1]}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert {one["slot"] for one in await house.slots("red")} == {slots[0], slots[2]}
    problem(await house.client.delete(f"/memory/dynamic/red/{slots[1]}"), "unknown-slot")
    before = await house.memory()
    (one,) = await house.predictions(images[1])
    assert (one["learned"]["outcome"], one["learned"]["slot"]) == ("rejected", None)
    assert await house.memory() == before
    await house.reset("dynamic")
    assert await house.outcomes(images[1]) == ["filled"]


async def test_an_unknown_slot_is_told_so(house: House) -> None:
    await house.predictions(picture("red"))
    (slot,) = await house.slots("red")
    for name, id_ in (("red", "none"), ("green", slot["slot"]), ("red", "%20"), ("red", "é")):
        problem(await house.client.delete(f"/memory/dynamic/{name}/{id_}"), "unknown-slot")
    assert await house.slots("red") == [slot]


async def test_slots_are_listed_surest_first_page_by_page(house: House) -> None:
    await house.predictions(*[picture("red", seed) for seed in range(7)])
    whole = await house.slots("red")
    assert [one["entropy"] for one in whole] == sorted(one["entropy"] for one in whole)
    found: list[Json] = []
    query: dict[str, Any] = {"limit": 3}
    sizes = []
    while True:
        page = (await house.client.get("/memory/dynamic/red", params=query)).json()
        found += page["items"]
        sizes.append(len(page["items"]))
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert (found, sizes) == (whole, [3, 3, 1])


async def test_bytes_are_two_for_each_entry_of_each_feature(house: House) -> None:
    await house.predictions(picture("red", 1), picture("blue", 2))
    await house.upload("red", picture("red", 3))
    assert (await house.memory())["bytes"] == 3 * 2 * 195
