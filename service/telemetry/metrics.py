"""The service's metrics, created on a given registry that one process owns. Base units, no unbounded label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from time import perf_counter, time_ns
from typing import Literal, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

STAGES = ("decode", "queue", "encode", "memory", "store")
OUTCOMES = ("filled", "replaced", "rejected", "duplicate", "skipped", "pending", "lost")
AGREEMENTS = ("all", "text_dynamic", "text_static", "dynamic_static", "none")
REFUSALS = ("queue-full", "rate-limited", "unauthenticated", "forbidden", "store-down", "draining")
FAULTS = ("image-unreadable", "image-too-large", "unsupported-media-type", "deadline-exceeded", "internal")
"""Of all refusals, and of all faults of images, those that alerts ask for."""

Lap = tuple[str, float, int]
"""One stage of an image's way: its name, the seconds that it took, and when it ended, in nanoseconds since 1970."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_NATS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)


class Metrics:
    """All metrics, by the names that dashboards and alerts rely on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, *labels: str, together: Literal["livesum", "livemax"] = "livesum") -> Gauge:
            """Make a gauge; `together` is what several processes show of it, of those that live."""
            return Gauge(name, text, labels, registry=registry, multiprocess_mode=together)

        self.requests = counter("dmn_requests_total", "Calls answered.", "method", "route", "code")
        self.rejected = counter("dmn_rejected_total", "Calls refused without work, by problem.", "reason")
        self.image_errors = counter("dmn_image_errors_total", "Images that failed, by problem.", "reason")
        self.predictions = counter("dmn_predictions_total", "Images answered, by which branches agree.", "agreement")
        self.updates = counter("dmn_memory_updates_total", "What images did to the dynamic memory.", "outcome")
        self.counted = counter("dmn_statistics_images_total", "What became of images for class statistics.", "outcome")
        self.shadows = counter(
            "dmn_shadow_images_total", "What became of images for the memory of the next encoder.", "outcome"
        )
        self.repairs = counter("dmn_memory_repairs_total", "Hot memories found different from the store's.")
        self.hot_evictions = counter("dmn_hot_evictions_total", "Hot memories dropped for room.")
        self.store_errors = counter("dmn_store_errors_total", "Store operations that failed.", "op")

        self.request_seconds = histogram("dmn_request_duration_seconds", "Time a call takes.", _SECONDS, "route")
        self.stage_seconds = histogram("dmn_stage_duration_seconds", "Time in one stage.", _SECONDS, "stage")
        self.batch_images = histogram("dmn_batch_images", "Images times views an encode batch.", _IMAGES)
        self.entropy_nats = histogram("dmn_memory_entropy_nats", "Entropy of images as the memory meets them.", _NATS)
        self.store_seconds = histogram("dmn_store_duration_seconds", "Time of a store operation.", _SECONDS, "op")
        self.sync_lag_seconds = histogram(
            "dmn_sync_lag_seconds", "Age of a hot memory's last sync when read.", _SECONDS
        )

        self.queue_images = gauge("dmn_queue_images", "Images times views waiting to be encoded.")
        self.inflight_images = gauge("dmn_inflight_images", "Images times views taken in and not answered yet.")
        self.fill_ratio = gauge(
            "dmn_memory_fill_ratio", "Filled slots over all, of the hot memories.", together="livemax"
        )
        self.hot_tenants = gauge("dmn_hot_tenants", "Tenants whose memory is ready to be read.")
        self.hot_bytes = gauge("dmn_hot_bytes", "Bytes of the hot memories.")
        self.jobs = gauge("dmn_jobs", "Jobs, by kind and state.", "kind", "state")
        self.device_bytes = gauge("dmn_device_memory_bytes", "Bytes that torch holds on the device.")
        self.build_info = gauge(
            "dmn_build_info", "What is running; always 1.", "version", "encoder", "fingerprint", together="livemax"
        )
        self._zeros()
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}

    @contextmanager
    def stage(self, name: str, into: list[Lap] | None = None) -> Iterator[None]:
        """Time one stage, in seconds, into its histogram and into a request's own laps."""
        start = perf_counter()
        try:
            yield
        finally:
            self.observe_stage(name, perf_counter() - start, into)

    def observe_stage(self, name: str, seconds: float, into: list[Lap] | None = None) -> None:
        """Record the time of one stage that ends now, in seconds, that was taken elsewhere."""
        self._stages[name].observe(seconds)
        if into is not None:
            into.append((name, seconds, time_ns()))

    def _zeros(self) -> None:
        """Start the series whose labels are known, so that a rate over them is 0 and not absent."""
        for outcome in OUTCOMES:
            self.updates.labels(outcome)
        for outcome in ("counted", "lost"):
            self.counted.labels(outcome)
        for outcome in ("learned", "late", "failed", "dropped"):
            self.shadows.labels(outcome)
        for agreement in AGREEMENTS:
            self.predictions.labels(agreement)
        for reason in REFUSALS:
            self.rejected.labels(reason)
        for reason in FAULTS:
            self.image_errors.labels(reason)


class _Part:
    """A gauge of which several show what they have together: the sum, or the largest."""

    def __init__(self, gauge: Gauge, parts: dict[int, float], together: Callable[[Iterable[float]], float]) -> None:
        self._gauge, self._parts, self._together = gauge, parts, together

    def set(self, value: float) -> None:
        self._parts[id(self)] = value
        self._gauge.set(self._together(self._parts.values()))


def divided(metrics: Metrics, among: int) -> list[Metrics]:
    """Return the same metrics for several sets of rooms, whose gauges would otherwise overwrite each other's."""
    parts = [copy(metrics) for _ in range(among)]
    for name in ("queue_images", "inflight_images", "hot_tenants", "hot_bytes", "fill_ratio"):
        held: dict[int, float] = {}
        for own in parts:
            part = _Part(getattr(metrics, name), held, max if name == "fill_ratio" else sum)
            setattr(own, name, cast("Gauge", part))
    return parts
