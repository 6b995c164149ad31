"""What every test may ask for, and the rule that on a build machine nothing is skipped that could run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import laws

CANNOT_RUN = ("no GPU", "no IPv6", "no real data")
"""How the reason of a skip starts where the machine lacks what no package brings."""

SLOW_FOLDERS = tuple(Path(__file__).parent / name for name in ("e2e", "deploy", "soak"))
"""Every test in these folders starts real processes or renders real manifests: all are of the slow tier."""

# As the command line sets it, and before torch is imported: threads that wait must not starve those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A test that wants a store which outlives it says so; none must meet the memories of whoever runs the tests.
os.environ["DMN_STORE"] = "memory"

# Unless the command line chooses another.
settings.load_profile(laws.SHORT)

_skipped: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scale", choices=("short", "long"), default="short", help="How long the runs of tests/soak are.")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the slow folders alone where they are not asked for: they import what only the `slow` extra brings."""
    return True if config.getoption("-m") == "not slow" and collection_path in SLOW_FOLDERS else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the slow folders."""
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in SLOW_FOLDERS):
            item.add_marker(pytest.mark.slow)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _note(f"{report.nodeid}", report.longrepr[2])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _note(report.nodeid, report.longrepr[2])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped and os.environ.get("CI"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped and os.environ.get("CI"):
        terminalreporter.section("skipped, although it could run here")
        for line in _skipped:
            terminalreporter.line(line)


def _note(where: str, reason: str) -> None:
    told = reason.removeprefix("Skipped: ")
    if not told.startswith(CANNOT_RUN):
        _skipped.append(f"{where}: {told}")
