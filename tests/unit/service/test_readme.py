"""The README names every setting, metric, problem type and command; a new one has to be told there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.cli.main import app
from service.problem_types import PROBLEMS
from service.settings import Settings
from service.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    assert f"`DMN_{name.upper()}`" in README


def test_every_metric_is_documented() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"`{name}`" in README, name


@pytest.mark.parametrize("slug", PROBLEMS)
def test_every_problem_type_is_documented(slug: str) -> None:
    assert f"`{slug}` | {PROBLEMS[slug].status} |" in README


@pytest.mark.parametrize("command", [own.callback.__name__ for own in app.registered_commands if not own.hidden])
def test_every_command_is_documented(command: str) -> None:
    assert f"`dmn {command}" in README


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|core|service|scripts)/[\w/.]+)`", README))))
def test_every_file_that_the_readme_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_nothing_was_left_to_be_filled_in() -> None:
    assert "@@" not in README
