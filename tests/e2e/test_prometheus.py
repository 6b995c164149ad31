"""A real Prometheus, with the configuration and the rules of `deploy/observability`, watches the real command."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.observability import ALERTS, CONFIG, RECORDED
from tests.support.fakes import picture
from tests.support.process import PATIENCE_S, Command
from tests.support.servers import HOST, free_ports, until

PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed")

CLASSES = ("red", "green", "blue")
SCRAPES = 4
INTERVALS = {"scrape_interval: 15s": "scrape_interval: 4s", "evaluation_interval: 15s": "evaluation_interval: 1s"}
"""What the configuration says, and what it says here: rules that wait for minutes have tests of promtool's."""

MINUTES_S = 240.0
"""How long a few scrapes and evaluations may take on a machine that is busy."""

LOOK_S = 0.25
OF_FAILURES = frozenset((
    "job:dmn_refusals:ratio_rate5m",
    "job:dmn_unusable_images:ratio_rate5m",
    "job:dmn_store_errors:ratio_rate1m",
    "job_op:dmn_store_errors:rate5m",
))  # fmt: skip
"""Recorded series that there are only once something was refused or failed."""


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    """A running Prometheus: the folder of its configuration, and what it can be asked."""

    folder: Path
    process: subprocess.Popen[bytes]
    client: httpx.Client

    def asked(self, path: str, **query: str) -> Any:
        """Return the data of an answer of its API."""
        answer = self.client.get(f"/api/v1/{path}", params=query).raise_for_status().json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, query: str) -> float | None:
        """Return the value of a query that gives one series, or none."""
        found = self.asked("query", query=query)["result"]
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else None

    def alerts(self) -> Mapping[str, str]:
        """Return the alerts that are pending or firing, with their states."""
        return {one["labels"]["alertname"]: one["state"] for one in self.asked("alerts")["alerts"]}

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules that it has loaded."""
        return [rule for group in self.asked("rules")["groups"] for rule in group["rules"]]

    def reload(self) -> None:
        """Have it read its configuration again."""
        self.process.send_signal(signal.SIGHUP)


@contextmanager
def watching(target: str, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus as it is configured, in a folder of its own, but for whom it watches and how often."""
    shutil.copytree(CONFIG.parent, folder, dirs_exist_ok=True)
    text = CONFIG.read_text()
    for usual, short in INTERVALS.items():
        assert text.count(usual) == 1
        text = text.replace(usual, short)
    (folder / CONFIG.name).write_text(text)
    (folder / "targets.yml").write_text(f'- targets: ["{target}"]\n')
    (port,) = free_ports(1)
    own = (f"--config.file={folder / CONFIG.name}", f"--storage.tsdb.path={folder / 'data'}")
    command = (str(PROMETHEUS), *own, f"--web.listen-address={HOST}:{port}")
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) as process,
        httpx.Client(base_url=f"http://{HOST}:{port}", timeout=PATIENCE_S, trust_env=False) as client,
    ):
        prometheus = Prometheus(folder=folder, process=process, client=client)
        try:
            until("Prometheus is ready", lambda: _ready(prometheus), PATIENCE_S)
            yield prometheus
        finally:
            process.kill()


def _ready(prometheus: Prometheus) -> bool:
    assert prometheus.process.poll() is None, (prometheus.folder / "log").read_text()[-2000:]
    try:
        return prometheus.client.get("/-/ready").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def scrapes(prometheus: Prometheus) -> float:
    return prometheus.value('count_over_time(up{job="dmn"}[10m])') or 0.0


def classified(prometheus: Prometheus, url: str) -> int:
    """Post pictures until there were enough scrapes, and return how many; all the time nothing may fire."""
    ends, sent = time.monotonic() + MINUTES_S, 0
    with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
        client.put("/tenants/default", json={"classes": list(CLASSES)}).raise_for_status()
        while scrapes(prometheus) < SCRAPES:
            assert time.monotonic() < ends, "a few scrapes take too long"
            body = picture(CLASSES[sent % len(CLASSES)], sent, form="JPEG")
            client.post("/classify", content=body, headers={"Content-Type": "image/jpeg"}).raise_for_status()
            sent += 1
            assert "firing" not in prometheus.alerts().values()
            time.sleep(LOOK_S)  # it is asked about the next scrape, of which it tells nobody; bounded above
    return sent


def test_a_healthy_service_is_scraped_without_a_failure_or_an_alert_and_seen_when_it_ends(
    tmp_path: Path,
) -> None:
    with Command("fake", "serve", "--port", "0", DMN_DRAIN_DELAY_S="0") as command:
        url = command.url()
        with watching(url.removeprefix("http://"), tmp_path) as prometheus:
            sent = classified(prometheus, url)
            until("all is counted", lambda: counted(prometheus) == sent, MINUTES_S)
            _check_scrapes(prometheus)
            _check_rules(prometheus)
            command.signal(signal.SIGTERM)
            assert command.ended() == 0
            _check_alert(prometheus)


def counted(prometheus: Prometheus) -> float | None:
    """Return how many pictures the service has counted by the last scrape."""
    assert "firing" not in prometheus.alerts().values()
    return prometheus.value('sum(dmn_predictions_total{job="dmn"})')


def _check_scrapes(prometheus: Prometheus) -> None:
    (target,) = prometheus.asked("targets", state="active")["activeTargets"]
    assert (target["health"], target["lastError"], target["labels"]["job"]) == ("up", "", "dmn")
    assert prometheus.value('min_over_time(up{job="dmn"}[10m])') == 1
    fewest = prometheus.value('min_over_time(scrape_samples_scraped{job="dmn"}[10m])')
    assert fewest is not None
    assert fewest > 50
    sent = counted(prometheus)
    assert prometheus.value('sum(dmn_requests_total{job="dmn", route="/classify", code="200"})') == sent
    assert prometheus.value('sum(dmn_request_duration_seconds_count{job="dmn", route="/classify"})') == sent
    assert prometheus.value('sum(dmn_stage_duration_seconds_count{job="dmn", stage="encode"})') == sent
    assert prometheus.value('sum(dmn_memory_updates_total{job="dmn"})') == sent


def _check_rules(prometheus: Prometheus) -> None:
    found = prometheus.rules()
    assert {rule["name"] for rule in found} == ALERTS.keys() | RECORDED.keys()
    assert {rule["name"]: rule["lastError"] for rule in found if rule["health"] != "ok"} == {}
    empty = {name for name in RECORDED if not prometheus.asked("query", query=name)["result"]}
    assert empty <= OF_FAILURES
    assert (prometheus.value("job:dmn_predictions:rate5m") or 0) > 0
    assert prometheus.value("job:dmn_request_errors:ratio_rate5m") == 0


def _check_alert(prometheus: Prometheus) -> None:
    """Check that the end of the service is noticed, is not told at once, and is once it has lasted: here a second."""
    until("the end is noticed", lambda: prometheus.alerts().get("DmnTargetDown") == "pending", MINUTES_S)
    rules = prometheus.folder / "rules" / "alerts.yml"
    as_written = f"expr: {ALERTS['DmnTargetDown']['expr']}\n        for: {ALERTS['DmnTargetDown']['for']}\n"
    text = rules.read_text()
    assert as_written in text
    rules.write_text(text.replace(as_written, as_written.replace(ALERTS["DmnTargetDown"]["for"], "1s")))
    prometheus.reload()
    until("the alert fires", lambda: prometheus.alerts().get("DmnTargetDown") == "firing", MINUTES_S)
