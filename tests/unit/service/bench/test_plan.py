"""What a fleet needs is counted, not guessed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from service.bench.plan import Costs, Fleet, needs
from service.cli.main import app
from service.memory.statistics_sync import EXCHANGE_S

FLEET = Fleet(
    devices=10,
    tenants=1000,
    classes=20,
    slots=50,
    shots=5,
    dim=512,
    rate=400.0,
    accepted=0.02,
    auto=False,
    home=True,
    shard_gib=16.0,
    shard_cores=0.5,
    hot_gib=1.0,
    link_mbit=5000.0,
)
COSTS = Costs()


def test_a_device_is_a_pod() -> None:
    assert needs(FLEET, COSTS)["pods"] == 10


def test_the_store_holds_every_slot_and_shot_of_every_tenant() -> None:
    bytes_ = needs(FLEET, COSTS)["store_gib"] * (1 << 30)
    assert bytes_ == pytest.approx(1000 * 20 * 55 * (2 * 512 + COSTS.slot_bytes))


def test_the_method_auto_has_a_square_of_the_feature_size_more_a_tenant_and_pod() -> None:
    more = (needs(replace(FLEET, auto=True), COSTS)["store_gib"] - needs(FLEET, COSTS)["store_gib"]) * (1 << 30)
    assert more == pytest.approx(2 * 1000 * 4 * 512**2, rel=0.05)


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("name", ["store_cores", "pod_mbit", "store_gib", "shards"])
def test_where_tenants_go_anywhere_nothing_gets_less(name: str, *, auto: bool) -> None:
    home, anywhere = (needs(replace(FLEET, auto=auto, home=home), COSTS)[name] for home in (True, False))
    assert anywhere >= home


def test_at_home_twice_the_pods_and_tenants_need_twice_the_store() -> None:
    one = needs(FLEET, COSTS)
    two = needs(replace(FLEET, devices=20, tenants=2000), COSTS)
    for name in ("store_gib", "store_cores"):
        assert two[name] == pytest.approx(2 * one[name])
    assert two["pod_mbit"] == pytest.approx(one["pod_mbit"])


def test_one_pod_that_has_all_tenants_hears_of_nobody_else() -> None:
    alone = replace(FLEET, devices=1)
    assert needs(replace(alone, home=False), COSTS) == needs(alone, COSTS)


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ({}, "devices"),
        ({"tenants": 100_000}, "a pod's hot memory"),
        ({"tenants": 100_000, "hot_gib": 1e4}, "the store's memory"),
        ({"accepted": 1.0, "shard_cores": 0.01}, "the store's cores"),
        ({"link_mbit": 1.0, "hot_gib": 1e4}, "the store's network"),
    ],
)
def test_what_is_short_first_is_named(changed: dict[str, float], first: str) -> None:
    assert needs(replace(FLEET, **changed), COSTS)["first"] == first  # type: ignore[arg-type]


def test_the_command_plans_every_pair_of_devices_and_tenants() -> None:
    told = CliRunner().invoke(app, ["bench", "plan", "--devices", "1,10", "--tenants", "10,1000", "--json"])
    assert told.exit_code == 0
    fleets = json.loads(told.stdout)["fleets"]
    assert {(one["devices"], one["tenants"]) for one in fleets} == {(1, 10), (10, 10), (1, 1000), (10, 1000)}


def test_it_counts_on_the_interval_at_which_statistics_are_exchanged() -> None:
    from service.bench import plan  # noqa: PLC0415 - what is looked into is none of its names

    assert plan._EXCHANGE_S == EXCHANGE_S
