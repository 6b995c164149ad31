"""`dmn bench serve` against the real command, and without what it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.process import Command


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Command("fake", "serve", "--port", "0") as service:
        yield service.url()


def test_a_running_service_is_measured_and_left_as_it_was(url: str, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    arguments = ("--url", url, "--rates", "20,40", "--seconds", "1", "--json", "--plot", str(plot))
    with Command("fake", "bench", "serve", *arguments) as bench:
        assert bench.ended() == 0, bench.err
        told = json.loads(bench.out)
    assert [(one["offered"], one["answered"], one["failed"]) for one in told["rates"]] == [(20, 20, 0), (40, 40, 0)]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [one["tenant"] for one in httpx.get(f"{url}/tenants").json()["items"]] == ["default"]


def test_a_service_that_cannot_be_started_is_skipped_with_its_own_words() -> None:
    with Command("fake", "bench", "serve", "--device", "no-such-device", "--json") as bench:
        assert bench.ended() == 0, bench.err
        assert "no-such-device" in json.loads(bench.out)["skipped"]


def test_a_service_that_does_not_answer_ends_it_with_2() -> None:
    with Command("fake", "bench", "serve", "--url", "http://127.0.0.1:9") as bench:
        assert bench.ended() == 2
        assert "No service answers" in "".join(bench.err)
