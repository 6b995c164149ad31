"""Slow callers at the real command in several processes; `tests/integration/test_doorstep.py` has one process."""

from __future__ import annotations

import socket
from contextlib import closing
from urllib.parse import urlsplit

import httpx

from tests.support.process import PATIENCE_S, Command


def test_half_a_head_is_given_up_while_others_are_answered() -> None:
    settings = {"DMN_HEADER_TIMEOUT_S": "5", "DMN_DRAIN_DELAY_S": "0"}
    with Command("fake", "serve", "--port", "0", "--http-workers", "2", **settings) as command:
        url = command.url()
        at = urlsplit(url)
        with closing(socket.create_connection((at.hostname, at.port), PATIENCE_S)) as slow:
            slow.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nX-")
            assert httpx.get(f"{url}/livez", trust_env=False).status_code == 200
            told = b"".join(iter(lambda: slow.recv(4096), b""))
        assert told.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert b"Traceback" not in "".join(command.err).encode()
