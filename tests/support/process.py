"""The real command, run as a user would, for tests."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

PATIENCE_S = 60.0
"""How long anything may take that is no fault; a command that hangs fails its test by it."""

ROOT = Path(__file__).parents[2]
DMN = Path(sys.executable).with_name("dmn")
WITH_FAKE = """
import sys
from service.cli import main
if "--http-workers" not in sys.argv:
    from core import openclip
    from tests.support.fakes import FakeEncoder
    openclip.load = lambda *_, **__: FakeEncoder()
sys.argv[0] = "dmn"
main()
"""
"""The command as it is, but for its encoder; where others load one, which start alike, it does without, as ever."""

URL = re.compile(r"http://\S+?:\d+")


class Command:
    """A running `dmn`; leaving the context kills it if it still runs."""

    def __init__(
        self,
        encoder: str,
        *arguments: str,
        store: str | None = "memory",
        script: str = WITH_FAKE,
        **environment: str,
    ) -> None:
        start = [sys.executable, "-c", script] if encoder == "fake" else [str(DMN)]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DMN_")}
        kept = {} if store is None else {"DMN_STORE": store}
        # A shell that started the tests in the background may have told its children to ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                [*start, *arguments],
                cwd=ROOT,
                env={**clean, **kept, "DMN_ENCODER": encoder, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.err: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.ended()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.err.append(line)
            self.lines.put(line)
        self.lines.put(None)

    def line(self, wanted: Callable[[str], bool]) -> str:
        """Wait for a line on stderr and return it."""
        ends = time.monotonic() + PATIENCE_S
        while True:
            line = self.lines.get(timeout=max(0.0, ends - time.monotonic()))
            assert line is not None, f"ended without the line: {''.join(self.err)}"
            if wanted(line):
                return line

    def url(self) -> str:
        """Wait until the server says where it is."""
        found = URL.search(self.line(lambda line: URL.search(line) is not None))
        assert found
        return found[0]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait for the end and return the exit status."""
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    @property
    def out(self) -> str:
        """What stood on stdout; after the end."""
        assert self.process.stdout is not None
        return self.process.stdout.read()
