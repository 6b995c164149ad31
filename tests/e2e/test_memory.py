"""What a user does to keep and to move memories, with the real command."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import pytest

from service.stores.embedded.binary import find_binary
from tests.support.fakes import picture
from tests.support.process import PATIENCE_S, Command

pytestmark = pytest.mark.skipif(find_binary() is None, reason="no Valkey or Redis server is installed")

RED = picture("red", 1)


def served(folder: Path) -> Command:
    return Command(
        "fake", "serve", "--port", "0", "--store", "embedded", DMN_DATA_DIR=str(folder), DMN_DRAIN_DELAY_S="0"
    )


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
    state = {"XDG_STATE_HOME": str(tmp_path), "DMN_DRAIN_DELAY_S": "0"}
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
        _check_refusals(new, tmp_path)
        leave(one)
        leave(two)
    assert not list(tmp_path.glob("*.part"))


def _check_refusals(url: str, folder: Path) -> None:
    """Check that a file that is no memory, and a tenant that is none, are refused by the service, and said so."""
    (folder / "no").write_bytes(b"no memory at all")
    with Command("lite", "memory", "import", str(folder / "no"), "--url", url) as import_:
        assert import_.ended() == 2
        assert "The request is not valid" in "".join(import_.err)
    with Command("lite", "memory", "export", str(folder / "x"), "--tenant", "nobody", "--url", url) as export:
        assert export.ended() == 2
        assert "There is no tenant 'nobody'" in "".join(export.err)
    assert not (folder / "x").exists()


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
