"""One profile for all laws: no deadlines, and the same examples every time where `CI` is set."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "laws",
    deadline=None,
    max_examples=12,
    derandomize=bool(os.environ.get("CI")),
    # A world is drawn from one seed and then filtered for close calls; both look slow or wasteful to hypothesis.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
settings.load_profile("laws")


def pytest_configure(config: pytest.Config) -> None:
    """Let beartype pick at random which item of a list it checks, also while a world is drawn: no draw sees it."""
    config.addinivalue_line(
        "filterwarnings",
        "ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning",
    )


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: these tensors are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
