"""Rules, dashboard and runbook: they load, ask only for what there is, and each alert does what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.observability import (
    ALERTS,
    CASES,
    CONFIG,
    DASHBOARD,
    HERE,
    RECORDED,
    ROOT,
    RULES,
    RUNBOOK,
    Query,
    dashboard_queries,
    exposed,
    grouped,
    panels,
    queries,
    read,
    selected,
)

PROMTOOL = shutil.which("promtool")
HEADINGS = ["## What it means", "## See it", "## Do", "## Undo", "## Wake somebody"]
SERIES = exposed()

with_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool, of Prometheus, is not installed")


def promtool(*arguments: str | Path) -> str:
    """Run it, and return what it says; it has to be content."""
    told = subprocess.run([str(PROMTOOL), *arguments], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


# Rules ----------------------------------------------------------------------------------------------------------------


@with_promtool
def test_the_configuration_and_the_rules_that_it_names_load() -> None:
    told = promtool("check", "config", CONFIG)
    assert f"{len(list(RULES.glob('*.yml')))} rule files found" in told


@with_promtool
def test_every_alert_fires_when_it_should_and_not_otherwise() -> None:
    promtool("test", "rules", *CASES)


def cases(alert: str) -> list[list[Any]]:
    """Return what each case of an alert expects."""
    return [one["exp_alerts"] for one in tried() if one["alertname"] == alert]


def tried() -> list[dict[str, Any]]:
    """Return what is tried in all cases."""
    return [one for file in CASES for test in read(file)["tests"] for one in test["alert_rule_test"]]


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_a_case_that_fires_it_and_one_that_does_not(alert: str) -> None:
    expected = cases(alert)
    assert any(expected)
    assert not all(expected)


def test_no_case_is_of_an_alert_that_there_is_not() -> None:
    assert {one["alertname"] for one in tried()} == set(ALERTS)


@with_promtool
@pytest.mark.parametrize("expression", ["vector(1)", "vector(1) > 2"])
def test_the_cases_notice_each_alert_that_fires_always_or_never(expression: str, tmp_path: Path) -> None:
    shutil.copytree(CONFIG.parent, tmp_path, dirs_exist_ok=True)
    told = [{"alert": alert, "expr": expression} for alert in ALERTS]
    (tmp_path / "rules" / "alerts.yml").write_text(yaml.safe_dump({"groups": [{"name": "wrong", "rules": told}]}))
    (tmp_path / "rules" / "recording.yml").write_text("groups: []")
    command = [str(PROMTOOL), "test", "rules", *(tmp_path / "tests").glob("*.yml")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert set(re.findall(r"alertname: (\w+)", run.stdout + run.stderr)) == set(ALERTS)


# Alerts and their pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_how_bad_it_is_what_it_is_and_where_its_page_is(alert: str) -> None:
    rule = ALERTS[alert]
    assert re.fullmatch(r"Dmn([A-Z][a-z]+)+", alert)
    assert rule["labels"] == {"severity": rule["labels"]["severity"]}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["description"].endswith(".")
    assert ROOT / rule["annotations"]["runbook_url"] == RUNBOOK / f"{alert}.md"


@pytest.mark.parametrize("alert", ALERTS)
def test_a_page_says_what_it_means_how_to_see_it_what_to_do_and_when_to_wake_somebody(alert: str) -> None:
    text = (RUNBOOK / f"{alert}.md").read_text()
    severity = ALERTS[alert]["labels"]["severity"]
    assert text.startswith(f"# {alert}\n\nSeverity: {severity}.\n")
    assert [line for line in text.splitlines() if line.startswith("## ")] == HEADINGS
    parts = re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]
    assert all(len(part.split()) >= 1 and part.strip().endswith((".", "?")) for part in parts)
    assert parts[-1].split()[0].strip(",.:") in ({"Yes"} if severity == "critical" else {"No", "Only"})


def test_there_is_no_page_without_an_alert() -> None:
    assert {file.stem for file in RUNBOOK.iterdir()} == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_the_overview_names_every_alert(alert: str) -> None:
    rule = ALERTS[alert]
    row = f"| [{alert}](runbook/{alert}.md) | {rule['labels']['severity']} | {rule['annotations']['summary']}. |"
    assert row in (HERE / "README.md").read_text()


@pytest.mark.parametrize("file", [HERE / "README.md", *sorted(RUNBOOK.glob("*.md"))], ids=lambda file: file.stem)
def test_what_a_page_points_to_is_there(file: Path) -> None:
    text = file.read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (file.parent / link).exists(), link
    metrics = re.findall(r"\bdmn_\w+|\bjob\w*:dmn_[\w:]+", text)
    assert set(metrics) <= set(SERIES) | {name.rpartition("_")[0] for name in SERIES if name.endswith("_bucket")}


# Expressions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.where)
def test_an_expression_asks_for_series_and_labels_that_there_are(query: Query) -> None:
    told = selected(query.text)
    assert told
    for name, labels in told:
        assert name in SERIES, name
        assert labels <= SERIES[name], (name, labels - SERIES[name])
    known = frozenset[str]().union(*(SERIES[name] for name, _ in told))
    assert grouped(query.text) <= known


def test_the_reader_of_expressions_finds_what_is_asked_for() -> None:
    text = 'sum by (job, le) (rate(a_total{x="b{c}", y!~"d"}[5m] offset 1d)) / on (z) group_left m:n or 0 * up == 1'
    assert selected(text) == [("a_total", {"x", "y"}), ("m:n", set()), ("up", set())]
    assert grouped(text) == {"job", "le", "z"}


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_series_is_named_for_its_labels_and_asked_for(name: str) -> None:
    labels, _, rest = name.partition(":")
    assert set(labels.split("_")) <= grouped(RECORDED[name]) | {"job"}
    assert rest.startswith("dmn_")
    assert [query for query in queries() if name in query.text and query.where != name]


@with_promtool
def test_every_expression_of_the_dashboard_can_be_read(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": query.text} for i, query in enumerate(dashboard_queries())]
    file = tmp_path / "dashboard.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


# The dashboard --------------------------------------------------------------------------------------------------------


def test_the_dashboard_shows_every_metric_or_what_is_made_of_it() -> None:
    asked = {_metric(name) for query in queries() for name, _ in selected(query.text)}
    assert {_metric(name) for name in SERIES if name.startswith("dmn_")} <= asked


def _metric(series: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", series)


def test_panels_say_what_they_show_lie_side_by_side_and_take_the_chosen_prometheus() -> None:
    told = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in told["panels"]}) == len(told["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in told["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in panels():
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_every_variable_of_the_dashboard_is_one_that_it_has() -> None:
    told = json.loads(DASHBOARD.read_text())
    named = {one["name"] for one in told["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text()))
    assert used - {"__rate_interval", "__all"} == named
