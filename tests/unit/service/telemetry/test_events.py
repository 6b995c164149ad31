"""The README's table of events says of each its level and its values, as the code logs it."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from service.telemetry import logs
from tests.support.process import ROOT

NAMES = {
    name: value for name, value in vars(logs).items() if name.isupper() and isinstance(value, str) and "dmn." in value
}
ROW = re.compile(r"^\| `(dmn\.[\w.]+)` \| (debug|info|warning|error) \| ([\w, ]*)\| \S", re.MULTILINE)
README = {
    name: (level, {word.strip() for word in values.split(",")} - {""})
    for name, level, values in ROW.findall((ROOT / "README.md").read_text())
}


def calls() -> Iterator[ast.Call]:
    """Yield every call of `logs.event` in the service."""
    for file in (ROOT / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logs.event":
                yield node


def logged() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Return the levels and the values of each event, by its name in `service.telemetry.logs`."""
    levels, values = defaultdict(set), defaultdict(set)
    for call in calls():
        name = ast.unparse(call.args[0]).removeprefix("logs.")
        told = {keyword.arg or "**": ast.unparse(keyword.value) for keyword in call.keywords}
        levels[name].add(told.pop("level", "logging.INFO").removeprefix("logging.").lower())
        values[name] |= told.keys()
    return levels, values


LEVELS, VALUES = logged()


def test_only_events_that_have_a_name_are_logged() -> None:
    assert set(LEVELS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_event_has_one_level_and_the_readme_says_it_and_its_values(name: str) -> None:
    (level,) = LEVELS[name]
    assert README[NAMES[name]] == (level, VALUES[name])


def test_the_readme_tells_of_no_other_events() -> None:
    assert set(README) == set(NAMES.values())


def test_no_two_events_share_a_name() -> None:
    assert len(set(NAMES.values())) == len(NAMES)
    assert all(re.fullmatch(r"dmn(\.[a-z_]+){1,2}", value) for value in NAMES.values())
