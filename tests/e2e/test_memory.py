"""What a user does to keep and to move memories, with the real command."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import pytest

from service.stores.embedded import find_binary
from tests.support.fakes import picture
from tests.support.process import PATIENCE_S, Command

pytestmark = pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed")

RED = picture("red", 1)


def served(folder: Path, **environment: str) -> Command:
    return Command("fake", "serve", "--port", "0", "--store", "embedded", DMN_DATA_DIR=str(folder), **environment)


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False)


def teach(url: str) -> str:
    """Name the classes, post a picture, and return what became of it."""
    with client(url) as own:
        assert own.put("/tenants/default", json={"classes": ["red", "green"]}).status_code == 200
        answer = own.post("/classify", content=RED, headers={"Content-Type": "image/png"})
        return str(answer.json()["predictions"][0]["learned"]["outcome"])


def asked(url: str) -> str:
    with client(url) as own:
        answer = own.post("/classify", content=RED, headers={"Content-Type": "image/png"})
        return str(answer.json()["predictions"][0]["learned"]["outcome"])


def leave(command: Command) -> None:
    command.signal(signal.SIGINT)
    assert command.ended() == 0, command.err


def test_a_service_with_nothing_configured_remembers_after_a_restart(tmp_path: Path) -> None:
    with Command("fake", "serve", "--port", "0", DMN_STORE="", XDG_STATE_HOME=str(tmp_path)) as refused:
        assert refused.ended() == 2  # an empty setting is none of the stores
    state = {"XDG_STATE_HOME": str(tmp_path)}
    for outcome in ("filled", "duplicate"):
        with Command("fake", "serve", "--port", "0", store=None, **state) as command:
            told = command.line(lambda line: "http://" in line)
            assert f"Memories are kept in {tmp_path / 'dmn'}" in told
            url = told.split("on ")[1].split()[0]
            assert (teach(url) if outcome == "filled" else asked(url)) == outcome
            leave(command)


def test_a_memory_is_moved_from_one_installation_to_another_by_two_commands(tmp_path: Path) -> None:
    file = tmp_path / "red.safetensors"
    with served(tmp_path / "one") as one, served(tmp_path / "two") as two:
        old, new = one.url(), two.url()
        assert teach(old) == "filled"
        with Command("lite", "memory", "export", str(file), "--url", old, "--json") as export:
            assert export.ended() == 0, export.err
            assert json.loads(export.out)["bytes"] == file.stat().st_size
        with Command("lite", "memory", "import", str(file), "--url", new) as import_:
            assert import_.ended() == 0, import_.err
            assert "The memory of default is now that of" in import_.out
        assert asked(new) == "duplicate"
        leave(one)
        leave(two)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "new", "--url", "http://127.0.0.1:1"), "No service answers at http://127.0.0.1:1"),
        (("export", "new", "--url", "127.0.0.1:1"), "--url takes a service's address"),
        (("export", "there", "--url", "http://127.0.0.1:1"), "--force"),
        (("import", "nowhere", "--url", "http://127.0.0.1:1"), "There is no file"),
    ],
)
def test_what_cannot_be_moved_is_one_clear_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    (tmp_path / "there").write_bytes(b"kept")
    call, file, *more = arguments
    with Command("lite", "memory", call, str(tmp_path / file), *more) as command:
        assert command.ended() == 2
        assert said in "".join(command.err)
        assert len(command.err) == 1
    assert (tmp_path / "there").read_bytes() == b"kept"


def test_a_file_that_is_no_memory_is_refused_by_the_service_and_said_so(tmp_path: Path) -> None:
    (tmp_path / "no").write_bytes(b"no memory at all")
    with served(tmp_path / "data") as command:
        url = command.url()
        with Command("lite", "memory", "import", str(tmp_path / "no"), "--url", url) as import_:
            assert import_.ended() == 2
            assert "The request is not valid" in "".join(import_.err)
        with Command("lite", "memory", "export", str(tmp_path / "x"), "--tenant", "nobody", "--url", url) as export:
            assert export.ended() == 2
            assert "There is no tenant 'nobody'" in "".join(export.err)
        leave(command)
    assert not (tmp_path / "x").exists()
