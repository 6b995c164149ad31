"""The metrics that dashboards and alerts rely on."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from service.problem_types import PROBLEMS
from service.telemetry.metrics import AGREEMENTS, FAULTS, OUTCOMES, REFUSALS, STAGES, Lap, Metrics, divided

FIXED: dict[str, tuple[type[MetricWrapperBase], tuple[str, ...]]] = {
    "dmn_requests_total": (Counter, ("method", "route", "code")),
    "dmn_rejected_total": (Counter, ("reason",)),
    "dmn_image_errors_total": (Counter, ("reason",)),
    "dmn_predictions_total": (Counter, ("agreement",)),
    "dmn_memory_updates_total": (Counter, ("outcome",)),
    "dmn_memory_repairs_total": (Counter, ()),
    "dmn_hot_evictions_total": (Counter, ()),
    "dmn_store_errors_total": (Counter, ("op",)),
    "dmn_statistics_images_total": (Counter, ("outcome",)),
    "dmn_shadow_images_total": (Counter, ("outcome",)),
    "dmn_request_duration_seconds": (Histogram, ("route",)),
    "dmn_stage_duration_seconds": (Histogram, ("stage",)),
    "dmn_batch_images": (Histogram, ()),
    "dmn_memory_entropy_nats": (Histogram, ()),
    "dmn_store_duration_seconds": (Histogram, ("op",)),
    "dmn_sync_lag_seconds": (Histogram, ()),
    "dmn_queue_images": (Gauge, ()),
    "dmn_inflight_images": (Gauge, ()),
    "dmn_memory_fill_ratio": (Gauge, ()),
    "dmn_hot_tenants": (Gauge, ()),
    "dmn_hot_bytes": (Gauge, ()),
    "dmn_jobs": (Gauge, ("kind", "state")),
    "dmn_device_memory_bytes": (Gauge, ()),
}
"""Kind and labels of each; `dmn_build_info` has labels of our choice."""


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def wrappers(metrics: Metrics) -> dict[str, MetricWrapperBase]:
    found = [one for one in vars(metrics).values() if isinstance(one, MetricWrapperBase)]
    return {one._name + ("_total" if isinstance(one, Counter) else ""): one for one in found}


def test_the_metrics_are_the_fixed_ones_and_no_others(metrics: Metrics) -> None:
    assert set(wrappers(metrics)) == {*FIXED, "dmn_build_info"}


@pytest.mark.parametrize("name", FIXED)
def test_a_metric_has_its_fixed_kind_and_labels(metrics: Metrics, name: str) -> None:
    kind, labels = FIXED[name]
    own = wrappers(metrics)[name]
    assert type(own) is kind
    assert tuple(own._labelnames) == labels


@pytest.mark.parametrize("name", [*FIXED, "dmn_build_info"])
def test_a_scrape_shows_every_metric_by_its_name_with_a_sentence(metrics: Metrics, name: str) -> None:
    text = generate_latest(metrics.registry).decode()
    line = next(line for line in text.splitlines() if line.startswith(f"# HELP {name} "))
    assert line.endswith(".")


def test_nothing_else_is_in_the_registry(metrics: Metrics) -> None:
    families = {family.name for family in metrics.registry.collect()}
    assert families == {name.removesuffix("_total") for name in (*FIXED, "dmn_build_info")}


@pytest.mark.parametrize(
    ("name", "label", "values"),
    [
        ("dmn_memory_updates_total", "outcome", OUTCOMES),
        ("dmn_predictions_total", "agreement", AGREEMENTS),
        ("dmn_stage_duration_seconds_count", "stage", STAGES),
        ("dmn_rejected_total", "reason", REFUSALS),
        ("dmn_image_errors_total", "reason", FAULTS),
    ],
)
def test_series_of_known_labels_start_at_zero(metrics: Metrics, name: str, label: str, values: tuple[str, ...]) -> None:
    assert [metrics.registry.get_sample_value(name, {label: value}) for value in values] == [0.0] * len(values)


def test_the_known_labels_are_the_fixed_ones() -> None:
    assert set(OUTCOMES) == {"filled", "replaced", "rejected", "duplicate", "skipped", "pending", "lost"}
    assert set(AGREEMENTS) == {"all", "text_dynamic", "text_static", "dynamic_static", "none"}
    assert PROBLEMS.keys() >= {*REFUSALS, *FAULTS}
    assert STAGES == ("decode", "queue", "encode", "memory", "store")


def test_two_registries_do_not_mix() -> None:
    one, other = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    one.hot_evictions.inc()
    assert other.registry.get_sample_value("dmn_hot_evictions_total") == 0.0


def test_a_stage_is_timed_even_if_it_fails(metrics: Metrics) -> None:
    laps: list[Lap] = []
    with pytest.raises(KeyError), metrics.stage("decode", laps):
        raise KeyError
    assert [(name, seconds >= 0.0) for name, seconds, _ in laps] == [("decode", True)]
    assert metrics.registry.get_sample_value("dmn_stage_duration_seconds_count", {"stage": "decode"}) == 1.0


def test_a_request_keeps_its_own_laps_in_order(metrics: Metrics) -> None:
    laps: list[Lap] = []
    metrics.observe_stage("store", 0.25, laps)
    metrics.observe_stage("store", 0.5, laps)
    metrics.observe_stage("encode", 1.0)
    assert [lap[:2] for lap in laps] == [("store", 0.25), ("store", 0.5)]
    assert laps[0][2] <= laps[1][2]
    assert metrics.registry.get_sample_value("dmn_stage_duration_seconds_sum", {"stage": "store"}) == 0.75


def test_gauges_of_several_sets_of_rooms_show_what_they_have_together(metrics: Metrics) -> None:
    one, two = divided(metrics, among=2)
    for own, held in ((one, 3.0), (two, 4.0), (one, 5.0)):
        own.hot_bytes.set(held)
        own.queue_images.set(held)
        own.fill_ratio.set(held / 10)
        own.repairs.inc()
    shown = {name: metrics.registry.get_sample_value(name) for name in ("dmn_hot_bytes", "dmn_queue_images")}
    assert shown == {"dmn_hot_bytes": 9.0, "dmn_queue_images": 9.0}
    assert metrics.registry.get_sample_value("dmn_memory_fill_ratio") == 0.5
    assert metrics.registry.get_sample_value("dmn_memory_repairs_total") == 3.0
