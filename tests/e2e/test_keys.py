"""Keys from the command line to every process of every service on one store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from ssl import PROTOCOL_TLS_CLIENT, SSLContext
from typing import Any

import httpx
import pytest

from service.stores.embedded.binary import find_binary
from tests.support.fakes import picture
from tests.support.process import PATIENCE_S, Command
from tests.support.servers import BINARIES, server

pytestmark = pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed")

OPERATOR_KEY = "correct-horse-battery-staple"
RED = picture("red", 1)
NO_TLS = SSLContext(PROTOCOL_TLS_CLIENT)
"""Made once: each client would read all certificates of the machine, which takes longer than a call."""


def served(store: str, *options: str, **environment: str) -> Command:
    return Command("fake", "serve", "--port", "0", *options, store=store, DMN_AUTH="keys", **environment)


def dmn(store: str, *arguments: str, **environment: str) -> str:
    """Run a command of the real program to its end, and return what it printed."""
    with Command("lite", *arguments, store=store, DMN_AUTH="keys", **environment) as command:
        assert command.ended() == 0, command.err
        return command.out


def create(store: str, *arguments: str, **environment: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(dmn(store, "keys", "create", *arguments, "--json", **environment))
    return made


def call(url: str, key: str | None, method: str = "POST", path: str = "/classify", **more: Any) -> httpx.Response:
    """Make one call, on a connection of its own."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    if path == "/classify":
        more, headers = {"content": RED}, headers | {"Content-Type": "image/png"}
    with httpx.Client(base_url=url, timeout=PATIENCE_S, verify=NO_TLS) as own:
        return own.request(method, path, headers=headers, **more)


def configure(url: str, key: str, tenant: str) -> None:
    answer = call(url, key, "PUT", f"/tenants/{tenant}", json={"classes": ["red", "green"]})
    assert answer.status_code in {200, 201}, answer.text


def until(told: Callable[[], bool]) -> None:
    """Ask until it is so; every question is a call of its own, which takes its time."""
    ends = time.monotonic() + PATIENCE_S
    while not told():
        assert time.monotonic() < ends


@pytest.fixture
def store() -> Iterator[str]:
    with server(str(BINARIES["valkey"])) as running:
        yield running.url


def test_a_key_is_made_and_revoked_for_all_processes_of_all_services(store: str) -> None:
    """How soon a revoked key is refused is a law of `service.access.authentication`, whose clock its own tests hold."""
    with served(store) as one, served(store, "--http-workers", "2") as other:
        urls = (one.url(), *(other.url(),) * 4)  # each connection may meet another of its HTTP processes
        (line,) = [json.loads(line) for line in one.err if "dmn.auth.no_keys" in line]
        assert "dmn keys create --scope operator" in line["how"]
        assert call(urls[0], None, "GET", "/readyz").status_code == 200
        operator = create(store, "--scope", "operator")["key"]
        until(lambda: call(urls[0], operator, "GET", "/tenants").status_code == 200)
        configure(urls[0], operator, "shop")
        old, new = (create(store, "--tenant", "shop", "--scope", "classify,memory", "--expires", "1h") for _ in "ab")
        for url in urls:
            assert call(url, None).status_code == 401
            for key in (old["key"], new["key"]):
                assert call(url, key).json()["tenant"] == "shop"
                assert call(url, key, "GET", "/memory").json()["tenant"] == "shop"
        dmn(store, "keys", "revoke", old["id"])
        for url in urls * 2:
            until(lambda url=url: call(url, old["key"]).status_code == 401)  # type: ignore[misc]
            until(lambda url=url: call(url, old["key"], "GET", "/memory").status_code == 401)  # type: ignore[misc]
            assert call(url, new["key"]).status_code == 200
        text = "".join((*one.err, *other.err))
        assert not any(key in text for key in (operator, old["key"], new["key"]))


def test_a_key_is_made_in_the_embedded_store_of_a_running_service_and_of_none(tmp_path: Path) -> None:
    place = {"DMN_DATA_DIR": str(tmp_path / "data")}
    early = create("embedded", "--tenant", "shop", "--scope", "admin", **place)
    with served("embedded", **place) as command:
        url = command.url()
        configure(url, early["key"], "shop")
        late = create("embedded", "--tenant", "shop", "--scope", "classify", **place)
        assert call(url, late["key"]).status_code == 200
        assert call(url, early["key"]).status_code == 403
    told = json.loads(dmn("embedded", "keys", "list", "--json", **place))["keys"]
    assert {one["id"] for one in told} == {early["id"], late["id"]}
    assert [one["tenant"] for one in told] == ["shop"] * 2


def test_the_operators_key_may_stand_in_a_file_and_move_a_memory(tmp_path: Path) -> None:
    """Several processes know the key of the file; commands that are given the file, or the key itself, use it."""
    file, key_file = tmp_path / "red.safetensors", tmp_path / "key"
    key_file.write_text(f"{OPERATOR_KEY}\n")
    settings = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_HOST": "0.0.0.0"}
    with served("memory", "--http-workers", "1", **settings) as command:
        url = command.url().replace("0.0.0.0", "127.0.0.1")
        configure(url, OPERATOR_KEY, "default")
        assert call(url, OPERATOR_KEY).status_code == 200
        assert call(url, OPERATOR_KEY[:-1]).status_code == 401
        assert not any("dmn.auth.no_keys" in line for line in command.err)
        dmn("memory", "memory", "export", str(file), "--url", url, "--key-file", str(key_file))
        port = url.rpartition(":")[2]
        dmn("memory", "memory", "import", str(file), DMN_PORT=port, DMN_OPERATOR_KEY=OPERATOR_KEY)
        # The operator's key of these settings is for no other service, and the one at a URL may be another's.
        with Command(
            "lite", "memory", "export", str(tmp_path / "x"), "--url", url, DMN_OPERATOR_KEY=OPERATOR_KEY
        ) as refused:
            assert refused.ended() == 2
            assert "--key-file" in "".join(refused.err)
