"""The laws of the folder are of both tiers: with few examples in the default tier, with many in the slow one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import laws

FOLDER = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Let beartype pick at random which item of a list it checks, also while a world is drawn: no draw sees it."""
    config.addinivalue_line(
        "filterwarnings",
        "ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Count the laws to the slow tier where the long profile is chosen, so that `-m slow` keeps them."""
    if config.getoption("--hypothesis-profile") == laws.LONG:
        for item in items:
            if item.path.is_relative_to(FOLDER):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: these tensors are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
