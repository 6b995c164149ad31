"""What is said of the method `auto` beside its answers."""

from __future__ import annotations

from tests.support.fakes import picture
from tests.support.house import Build, House


async def test_the_memory_tells_how_far_each_part_is_trusted(house: House) -> None:
    await house.client.put("/tenants/default", json={"classes": ["red", "green", "blue"]})
    told = (await house.memory())["adaptation"]
    assert (told["images"], told["shots_weight"], told["statistics_weight"], told["held_out"]) == (0, 0.0, 0.0, 0)
    assert (told["sharpness"], told["temperature"]) == (1.0, 1.0)
    await house.upload("red", *(picture("red", seed) for seed in range(2)))
    await house.upload("green", *(picture("green", seed) for seed in range(2)))
    await house.predictions(*(picture("blue", seed) for seed in range(5)))
    told = (await house.memory())["adaptation"]
    assert told["images"] == 5
    assert told["held_out"] == 4
    assert told["statistics_weight"] > 0.0


async def test_with_the_paper_s_method_there_is_nothing_to_tell(build: Build) -> None:
    house = await build()
    await house.put(method="dmn")
    (told,) = await house.predictions(picture("red", 1))
    assert told["readouts"]["statistics"] is None
    assert (await house.memory())["adaptation"] is None


async def test_images_that_are_counted_are_counted_in_the_metrics_too(house: House) -> None:
    series = 'dmn_statistics_images_total{outcome="counted"}'
    images, before = [picture("red", seed) for seed in range(30, 33)], (await house.metrics())[series]
    await house.predictions(*images)
    await house.predictions(*images)
    await house.predictions(picture("red", 9), learn=False)
    assert (await house.metrics())[series] - before == 3


async def test_an_image_that_was_only_asked_about_is_counted_once_it_may_be_learned(house: House) -> None:
    series = 'dmn_statistics_images_total{outcome="counted"}'
    asked, other = picture("red", 50), picture("green", 51)
    before = (await house.metrics())[series]
    await house.predictions(asked, learn=False)
    await house.predictions(other)
    await house.predictions(asked)
    assert (await house.metrics())[series] - before == 2
