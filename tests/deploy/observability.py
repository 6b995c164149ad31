"""What `deploy/observability` holds, read once for the tests of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from service.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
HERE = ROOT / "deploy" / "observability"
CONFIG = HERE / "prometheus" / "prometheus.yml"
RULES = HERE / "prometheus" / "rules"
CASES = sorted((HERE / "prometheus" / "tests").glob("*.yml"))
DASHBOARD = HERE / "grafana" / "dashboard.json"
RUNBOOK = HERE / "runbook"

SCRAPED = frozenset(("job", "instance"))
"""Labels that every series has from its scrape."""

OTHERS: Mapping[str, frozenset[str]] = {"up": SCRAPED, "ALERTS": SCRAPED | {"alertname", "alertstate", "severity"}}
"""Series of Prometheus itself, and their labels."""


def read(path: Path) -> Any:
    """Return what a YAML file holds."""
    return yaml.safe_load(path.read_text())


def rules() -> list[dict[str, Any]]:
    """Return all rules, of both files."""
    return [rule for file in sorted(RULES.glob("*.yml")) for group in read(file)["groups"] for rule in group["rules"]]


ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDED: dict[str, str] = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


@dataclass(frozen=True, kw_only=True)
class Query:
    """One expression, and where it stands."""

    where: str
    text: str


def panels() -> Iterator[dict[str, Any]]:
    """Yield every panel of the dashboard but its rows."""
    yield from (panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row")


def dashboard_queries() -> list[Query]:
    """Return what the dashboard asks, with a value in place of each of Grafana's variables."""
    told = json.loads(DASHBOARD.read_text())
    found = [
        Query(where=f"{panel['title']} {target['refId']}", text=target["expr"])
        for panel in panels()
        for target in panel["targets"]
    ]
    found += [Query(where=one["name"], text=one["expr"]) for one in told["annotations"]["list"]]
    asked = [one for one in told["templating"]["list"] if one["type"] == "query"]
    found += [Query(where=one["name"], text=_selector(one["query"]["query"])) for one in asked]
    return [Query(where=one.where, text=_filled(one.text)) for one in found]


def queries() -> list[Query]:
    """Return every expression of rules and dashboard."""
    own = [Query(where=rule.get("alert") or rule["record"], text=rule["expr"]) for rule in rules()]
    return own + dashboard_queries()


def exposed() -> dict[str, frozenset[str]]:
    """Return the labels of every series that there may be, by its name, recording rules among them."""
    wrappers = [one for one in vars(Metrics(CollectorRegistry())).values() if isinstance(one, MetricWrapperBase)]
    found = {name: labels for one in wrappers for name, labels in _series(one)}
    recorded = {name: frozenset(name.partition(":")[0].split("_")) for name in RECORDED}
    return found | recorded | dict(OTHERS)


def _series(metric: MetricWrapperBase) -> Iterator[tuple[str, frozenset[str]]]:
    labels = SCRAPED | set(metric._labelnames)
    if isinstance(metric, Histogram):
        yield f"{metric._name}_bucket", labels | {"le"}
        yield f"{metric._name}_sum", labels
        yield f"{metric._name}_count", labels
    elif isinstance(metric, Counter):
        yield f"{metric._name}_total", labels
    else:
        yield metric._name, labels


# A reader of expressions ----------------------------------------------------------------------------------------------

_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
_RANGE = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\})?")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_WORDS = frozenset(("and", "or", "unless", "bool", "group_left", "group_right"))


def selected(text: str) -> list[tuple[str, set[str]]]:
    """Return the series that an expression selects, and the labels that it asks of each."""
    plain = _GROUPING.sub(" ", _RANGE.sub("", _TEXT.sub('""', text)))
    found = []
    for match in _SELECTOR.finditer(plain):
        name, matchers = match[1], match[2] or ""
        called = plain[match.end() :].lstrip().startswith("(") and match[2] is None
        if name not in _WORDS and not called:
            found.append((name, set(re.findall(r"(\w+)\s*[=!]", matchers))))
    return found


def grouped(text: str) -> set[str]:
    """Return the labels that an expression groups or matches by."""
    return {label.strip() for names in _GROUPING.findall(text) for label in names.split(",")} - {""}


def _filled(text: str) -> str:
    return text.replace("$__rate_interval", "5m").replace("$job", "dmn").replace("$instance", ".*")


def _selector(query: str) -> str:
    """Return what `label_values(SELECTOR, LABEL)` of a variable selects."""
    return query.removeprefix("label_values(").rpartition(",")[0]
