"""A pod that cannot start: `dmn serve` says in one line what is wrong, and never becomes ready.

Each runs `dmn serve` with the settings of an overlay, one of them wrong: in this process where a line of the command
itself says it, and as the real command where other processes or the environment of the interpreter have a part in it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from redis import Redis

from core.encoders import openclip
from service.app import create_app
from service.cli import main
from service.settings import Settings
from service.telemetry import logs
from tests.deploy.manifests import overlay, settings_of
from tests.support.fakes import FakeEncoder
from tests.support.process import Command
from tests.support.servers import BINARIES, HOST, server

KEY = "an-operators-key-for-tests"
WITH_REDIS = pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed")

Refused = Callable[..., str]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "operator"
    file.write_text(KEY)
    return file


def wrong_settings(wrong: dict[str, str]) -> dict[str, str]:
    """Return the settings of an overlay, of which some are others."""
    told = settings_of(overlay("redis")) | {"DMN_HOST": HOST, "DMN_PORT": "0", "HF_ENDPOINT": f"http://{HOST}:1"}
    told.pop("DMN_ENCODER")
    return told | wrong


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., list[str]]]:
    """Return what runs `dmn serve` in this process until it refuses to serve, and returns its lines on stderr."""
    for name in filter(lambda name: name.upper().startswith("DMN_"), list(os.environ)):
        monkeypatch.delenv(name)
    root, levels = logging.getLogger(), (logging.getLogger().level, logs.logger.level)
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    monkeypatch.setattr(openclip, "load", lambda *_, **__: FakeEncoder())
    monkeypatch.setattr(sys, "argv", ["dmn", "serve"])
    term = signal.getsignal(signal.SIGTERM)

    def run(**wrong: str) -> list[str]:
        for name, value in wrong_settings(wrong).items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main.main()
        told = capsys.readouterr()
        assert end.value.code == 2, told.err
        assert not told.out
        return told.err.splitlines()

    yield run
    signal.signal(signal.SIGTERM, term)
    root.setLevel(levels[0])
    logs.logger.setLevel(levels[1])


@pytest.fixture
def refused(ended: Callable[..., list[str]]) -> Refused:
    """Return what runs `dmn serve` in this process, and returns the one line with which it refuses to serve."""

    def run(**wrong: str) -> str:
        (line,) = ended(**wrong)
        assert line.startswith("dmn: ")
        return line.removeprefix("dmn: ")

    return run


def refused_by_the_command(*, encoder: str = "fake", **wrong: str) -> str:
    """Return the one line with which the real command refuses to serve."""
    with Command(encoder, "serve", store=None, **wrong_settings(wrong)) as command:
        assert command.ended() == 2, command.err
        assert not command.out
        (line,) = command.err
        assert line.startswith("dmn: ")
        assert "dmn serves" not in line
    return line.removeprefix("dmn: ").rstrip()


# A wrong value --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"DMN_PORT": "tcp://10.0.0.1:80"}, "DMN_PORT: Input should be a valid integer"),
        ({"DMN_PORT": "80000"}, "DMN_PORT: "),
        ({"DMN_AUTH": "none"}, "DMN_AUTH: "),
        ({"DMN_AUTH": "open", "DMN_HOST": "0.0.0.0"}, "DMN_AUTH=open lets anyone"),
        ({"DMN_DRAIN_TIMEOUT_S": "30s"}, "DMN_DRAIN_TIMEOUT_S: "),
        ({"DMN_HOT_MEMORY_BYTES": "1Gi"}, "DMN_HOT_MEMORY_BYTES: "),
        ({"DMN_STORE": ""}, "DMN_STORE: must be"),
        ({"DMN_STORE": "store.example.org:6379"}, "DMN_STORE: must be"),
        ({"DMN_STORE": "redis+cluster://"}, "The store URL has no host."),
        ({"DMN_DEVICE": "cuda:99"}, "The device 'cuda:99' cannot be used here"),
        ({"DMN_DEVICE": "gpu"}, "The device 'gpu' cannot be used here"),
    ],
)
def test_a_wrong_value_is_said_in_one_line(refused: Refused, key_file: Path, wrong: dict[str, str], said: str) -> None:
    told = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_STORE": "memory"} | wrong
    assert refused(**told).startswith(said)


def test_the_real_command_says_a_wrong_value_in_one_line(key_file: Path) -> None:
    wrong = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_STORE": "memory", "DMN_PORT": "tcp://10.0.0.1:80"}
    assert refused_by_the_command(**wrong).startswith("DMN_PORT: Input should be a valid integer")


def test_a_value_that_is_no_setting_is_said_although_it_has_no_effect(
    ended: Callable[..., list[str]], key_file: Path
) -> None:
    wrong = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_STORE": f"redis://{HOST}:1", "DMN_STORES": "memory"}
    lines = ended(**wrong)
    assert lines[0] == "dmn: DMN_STORES is no setting and has no effect."


# A missing secret -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", "short", "zwanzig Zeichen und mehr"])
def test_an_operators_key_that_is_none_is_said_in_one_line(
    refused: Refused, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "operator"
    if content is not None:
        file.write_text(content)
    line = refused(DMN_OPERATOR_KEY_FILE=str(file), DMN_STORE="memory")
    assert line.startswith(f"DMN_OPERATOR_KEY_FILE names {file}, which ")
    assert ("cannot be read" in line) is (content is None)
    assert not content or content not in line


@WITH_REDIS
def test_a_store_that_asks_for_another_password_is_said_in_one_line(refused: Refused, key_file: Path) -> None:
    with server(str(BINARIES["valkey"]), "--requirepass", "right") as running:
        wrong = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_STORE": f"unix://:wrong@{running.socket}"}
        line = refused(**wrong)
    assert "refuses the user or the password" in line
    assert "wrong" not in line


# A store --------------------------------------------------------------------------------------------------------------


def test_a_store_that_is_not_there_is_said_in_one_line(refused: Refused, key_file: Path) -> None:
    line = refused(DMN_OPERATOR_KEY_FILE=str(key_file), DMN_STORE=f"redis://{HOST}:1")
    assert line.startswith(f"The store at {HOST}:1 refuses the connection")


@WITH_REDIS
def test_a_store_of_another_major_format_is_said_in_one_line_and_stays_as_it_is(
    refused: Refused, key_file: Path
) -> None:
    with server(str(BINARIES["valkey"])) as store:
        with TestClient(create_app(Settings(store=store.url, encoder="fake", device="cpu"))):
            """It makes the default tenant."""
        with Redis(unix_socket_path=str(store.socket)) as client:
            client.hset("dmn:{default}:cfg", "format", "9")
            before = client.hgetall("dmn:{default}:cfg")
            settings = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_STORE": store.url}
            lines = [
                refused(**settings, DMN_HTTP_WORKERS="0"),
                refused_by_the_command(**settings, DMN_HTTP_WORKERS="2"),
            ]
            assert client.hgetall("dmn:{default}:cfg") == before
    for line in lines:
        assert "'default' is stored in format 9" in line
        assert "Serve it with the version that wrote it" in line


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "encoder", "said"),
    [
        (
            "0",
            "ViT-B-16/openai",
            "ViT-B-16/openai was asked for, but its weights are not in the cache and cannot be downloaded",
        ),
        ("1", "ViT-B-16/openai@/weights/none.safetensors", "but there is no file /weights/none.safetensors"),
    ],
)
def test_weights_that_are_not_there_are_said_in_one_line(
    tmp_path: Path, key_file: Path, encoder: str, said: str, workers: str
) -> None:
    settings = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_STORE": "memory", "DMN_HTTP_WORKERS": workers}
    assert said in refused_by_the_command(encoder=encoder, HF_HOME=str(tmp_path), **settings)
