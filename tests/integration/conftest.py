"""Fixtures of the service over an encoder without weights, called over HTTP without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from pytest_asyncio import is_async_test

from core.encoders.protocol import Encoder
from service.tenants import reindex
from tests.support.house import PATIENCE_S, Build, GatedEncoder, House, SoftEncoder, opened

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run all these tests in one event loop, so that most can share one house."""
    for item in items:
        if item.path.is_relative_to(HERE) and is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep torch from starting a team of threads for tensors of a few hundred numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _in_its_own_time() -> Iterator[None]:
    """Let a change wait for the upkeep that it causes: on a machine that stalls, a moment is too short for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reindex, "_SOON_S", PATIENCE_S)
        yield


@pytest_asyncio.fixture(loop_scope="session")
async def build() -> AsyncIterator[Build]:
    """Return what opens houses; all are closed after the test."""
    async with AsyncExitStack() as stack:

        async def one(encoder: Encoder | None = None, **settings: Any) -> House:
            house = await stack.enter_async_context(opened(encoder or SoftEncoder(), **settings))
            if isinstance(encoder, GatedEncoder):
                stack.callback(encoder.gate.set)
            return house

        yield one


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def common() -> AsyncIterator[House]:
    """Return the house that tests share, one after the other; nothing happens in it but what a test asks for."""
    async with opened(SoftEncoder()) as house:
        yield house


@pytest_asyncio.fixture(loop_scope="session")
async def house(common: House) -> House:
    """Return a house, with default settings, whose only tenant is the default one and knows three colours."""
    for one in (await common.client.get("/tenants")).json()["items"]:
        await common.client.delete(f"/tenants/{one['tenant']}")
    assert (await common.put()).status_code == 200
    return common
