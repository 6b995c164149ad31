"""`dmn bench serve` against the real command, and without what it needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from service.cli import main
from tests.support.process import Command


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Command("fake", "serve", "--port", "0") as service:
        yield service.url()


def test_a_running_service_is_measured_and_left_as_it_was(url: str, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    arguments = ("--url", url, "--rates", "4,8", "--seconds", "5", "--json", "--plot", str(plot))
    with Command("fake", "bench", "serve", *arguments) as bench:
        assert bench.ended() == 0, bench.err
        told = json.loads(bench.out)
    assert [(one["offered"], one["answered"], one["failed"]) for one in told["rates"]] == [(4, 20, 0), (8, 40, 0)]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [one["tenant"] for one in httpx.get(f"{url}/tenants").json()["items"]] == ["default"]


def test_a_service_that_cannot_be_started_is_skipped_with_its_own_words() -> None:
    arguments = ["bench", "serve", "--device", "no-such-device", "--json"]
    result = CliRunner().invoke(main.app, arguments, env={"DMN_ENCODER": "fake"})
    assert result.exit_code == 0, result.output
    assert "no-such-device" in json.loads(result.stdout)["skipped"]


def test_a_service_that_does_not_answer_ends_it_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dmn", "bench", "serve", "--url", "http://127.0.0.1:9"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert "No service answers" in capsys.readouterr().err
