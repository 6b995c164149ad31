"""A process that uses the embedded server of a folder and nothing else: `python -m tests.soak.holder FOLDER`.

It says that it is here, begins when it is told a line, says which server it has, and leaves when there are no more.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from service.stores.embedded.server import embedded_server


async def main(folder: Path) -> None:
    server = embedded_server(folder, "", fsync="everysec")
    print("here", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    async with server.running():
        print(server.pid, flush=True)
        await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
