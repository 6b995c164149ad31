"""The size of the runs: `short` among the tests, or `long`."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> str:
    """Return how long runs are: `short` or `long`. Only a long run judges how fast the service is."""
    return str(request.config.getoption("--scale"))
