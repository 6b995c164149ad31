"""A pod that cannot start: `dmn serve` says in one line what is wrong, and never becomes ready.

Each runs the real command with the settings of an overlay, one of them wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from tests.deploy.manifests import overlay, settings_of
from tests.support.process import Command
from tests.support.servers import BINARIES, HOST, Running, server

KEY = "an-operators-key-for-tests"
WITH_REDIS = pytest.mark.skipif(BINARIES["valkey"] is None, reason="no Valkey or Redis server is installed")


@pytest.fixture
def store() -> Iterator[Running]:
    """Yield a store that is fit."""
    with server(str(BINARIES["valkey"])) as running:
        yield running


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "operator"
    file.write_text(KEY)
    return file


def refused(name: str, *, encoder: str = "fake", **wrong: str) -> str:
    """Return the one line with which the service refuses the settings of an overlay, of which some are others."""
    told = settings_of(overlay(name)) | {"DMN_HOST": HOST, "DMN_PORT": "0", "HF_ENDPOINT": f"http://{HOST}:1"} | wrong
    told.pop("DMN_ENCODER")
    with Command(encoder, "serve", store=None, **told) as command:
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
def test_a_wrong_value_is_said_in_one_line(key_file: Path, wrong: dict[str, str], said: str) -> None:
    told = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_STORE": "memory"} | wrong
    assert refused("redis", **told).startswith(said)


def test_a_value_that_is_no_setting_is_said_although_it_has_no_effect(key_file: Path) -> None:
    wrong = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_STORE": f"redis://{HOST}:1", "DMN_STORES": "memory"}
    told = settings_of(overlay("redis")) | {"DMN_HOST": HOST, "DMN_PORT": "0"} | wrong
    told.pop("DMN_ENCODER")
    with Command("fake", "serve", store=None, **told) as command:
        assert command.ended() == 2
        assert command.err[0] == "dmn: DMN_STORES is no setting and has no effect.\n"


# A missing secret -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", "short", "zwanzig Zeichen und mehr"])
def test_an_operators_key_that_is_none_is_said_in_one_line(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "operator"
    if content is not None:
        file.write_text(content)
    line = refused("redis", DMN_OPERATOR_KEY_FILE=str(file), DMN_STORE="memory")
    assert line.startswith(f"DMN_OPERATOR_KEY_FILE names {file}, which ")
    assert ("cannot be read" in line) is (content is None)
    assert not content or content not in line


@WITH_REDIS
def test_a_store_that_asks_for_another_password_is_said_in_one_line(key_file: Path) -> None:
    with server(str(BINARIES["valkey"]), "--requirepass", "right") as running:
        wrong = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_STORE": f"unix://:wrong@{running.socket}"}
        line = refused("redis", **wrong)
    assert "refuses the user or the password" in line
    assert "wrong" not in line


# A store --------------------------------------------------------------------------------------------------------------


def test_a_store_that_is_not_there_is_said_in_one_line(key_file: Path) -> None:
    line = refused("redis", DMN_OPERATOR_KEY_FILE=str(key_file), DMN_STORE=f"redis://{HOST}:1")
    assert line.startswith(f"The store at {HOST}:1 refuses the connection")


@WITH_REDIS
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_store_of_another_major_format_is_said_in_one_line_and_stays_as_it_is(
    store: Running, key_file: Path, workers: str
) -> None:
    own = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_STORE": store.url, "DMN_HTTP_WORKERS": workers}
    with Command("fake", "serve", store=None, DMN_PORT="0", **{**own, "DMN_HTTP_WORKERS": "0"}) as command:
        command.url()
    with Redis(unix_socket_path=str(store.socket)) as client:
        client.hset("dmn:{default}:cfg", "format", "9")
        before = client.hgetall("dmn:{default}:cfg")
        line = refused("redis", **own)
        assert client.hgetall("dmn:{default}:cfg") == before
    assert "'default' is stored in format 9" in line
    assert "Serve it with the version that wrote it" in line


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        (
            "ViT-B-16/openai",
            "ViT-B-16/openai was asked for, but its weights are not in the cache and cannot be downloaded",
        ),
        ("ViT-B-16/openai@/weights/none.safetensors", "but there is no file /weights/none.safetensors"),
    ],
)
def test_weights_that_are_not_there_are_said_in_one_line(
    tmp_path: Path, key_file: Path, encoder: str, said: str, workers: str
) -> None:
    own = {"DMN_OPERATOR_KEY_FILE": str(key_file), "DMN_STORE": "memory", "DMN_HTTP_WORKERS": workers}
    assert said in refused("redis", encoder=encoder, HF_HOME=str(tmp_path), **own)
