"""Where a store is chosen: the one file that knows all of them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from service.settings import Settings
from service.stores.connection.pools import connect
from service.stores.embedded.server import embedded_server
from service.stores.redis.store import RedisStore

from .in_process import InProcessStore
from .protocol import MemoryStore


@asynccontextmanager
async def open_store(settings: Settings) -> AsyncIterator[MemoryStore]:
    """Open the store that the settings name, and close it; the embedded one is started and stopped around it.

    Raises:
        StoreDown: it does not answer, or cannot be started.
    """
    ttl_s, room = settings.idempotency_ttl_s, settings.idempotency_max_bytes
    if settings.store == "memory":
        yield InProcessStore(clock=time.time, remember_s=ttl_s, remember_bytes=room)
        return
    async with AsyncExitStack() as stack:
        url = settings.store
        if url == "embedded":
            server = embedded_server(settings.data_dir, settings.embedded_binary, fsync=settings.embedded_fsync)
            await stack.enter_async_context(server.running())
            url = server.url
        # Wall time: answers kept for their idempotency keys are shared by workers, and outlive them.
        client = connect(url, timeout_s=settings.store_timeout_ms / 1000)
        spread = "+cluster:" in url
        store = RedisStore(client, clock=time.time, remember_s=ttl_s, remember_bytes=room, spread=spread)
        stack.push_async_callback(store.aclose)
        await store.check()
        yield store
