"""A client of one server, whose every command has a deadline."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import (
    ConnectionPool,
    Redis,
)
from redis.asyncio.client import Pipeline


class Single(Redis):
    """A client of one server, or of the one that Sentinels name."""

    def __init__(self, pool: ConnectionPool, *, shown: str, patience_s: float) -> None:
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self.shown, self.patience_s = shown, patience_s

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        async with asyncio.timeout(self.patience_s):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:  # noqa: ARG002, FBT001, FBT002 - as in the base
        return Batch(self, transaction=transaction)

    async def asking(self, *args: Any, **options: Any) -> Any:
        """Run a command for a slot that is on its way to this node of a cluster: what allows it goes just before it."""
        batch = self.pipeline(transaction=False)
        batch.execute_command("ASKING")
        batch.execute_command(*args, **options)
        return (await batch.execute())[1]

    async def aclose(self, close_connection_pool: bool | None = None) -> None:  # noqa: FBT001 - as in the base
        """Close every connection, also those to Sentinels."""
        await super().aclose(close_connection_pool)
        for sentinel in getattr(getattr(self.connection_pool, "sentinel_manager", None), "sentinels", ()):
            await sentinel.aclose()


class Batch(Pipeline):
    """Commands for one server that go together."""

    def __init__(self, client: Single, *, transaction: bool) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, transaction, None)
        self._patience_s = client.patience_s

    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002 - as in the base
        async with asyncio.timeout(self._patience_s):
            return await super().execute(raise_on_error)
