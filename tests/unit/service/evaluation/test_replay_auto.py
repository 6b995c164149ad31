"""`dmn replay` with the method `auto`, and what it came to on real streams of features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from service.cli import main
from tests.support.process import ROOT

STREAMS = ROOT.parent / "shared" / "data" / "streams"
N, C, D = 90, 4, 12


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    text = 3 * rng.standard_normal(D) + rng.standard_normal((C, D))
    labels = rng.integers(0, C, N)
    features = text[labels] + 0.8 * rng.standard_normal((N, D))
    shots = np.repeat(text, 2, 0) + 0.8 * rng.standard_normal((2 * C, D))
    path = tmp_path / "stream.npz"
    np.savez(path, text=text, features=features, labels=labels, shots=shots, shot_labels=np.repeat(np.arange(C), 2))
    return path


def replayed(*arguments: object) -> Any:
    result = CliRunner().invoke(main.app, ["replay", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_replay_with_auto_tells_of_the_branch_of_statistics(stream: Path, tmp_path: Path) -> None:
    told = replayed(stream, "--method", "auto", "--out", tmp_path / "out.npz")
    assert list(told["accuracy"]) == ["text", "dynamic", "static", "statistics", "fused"]
    with np.load(tmp_path / "out.npz") as out:
        assert set(out.files) == {*told["accuracy"], "slot", "counts", "entropies"}
        assert (out["statistics"].shape, out["statistics"].dtype) == ((N, C), np.float32)
        np.testing.assert_allclose(out["statistics"].sum(1), 1.0, atol=1e-5)
        with np.load(stream) as given:
            right = out["statistics"].argmax(1) == given["labels"]
        assert told["accuracy"]["statistics"] == pytest.approx(100 * right.mean(), abs=1e-3)


def test_a_replay_with_auto_that_does_not_learn_counts_nothing(stream: Path, tmp_path: Path) -> None:
    arguments = (stream, "--method", "auto", "--shots", 0, "--no-learn", "--out", tmp_path / "out.npz")
    told = replayed(*arguments)
    assert told["accuracy"]["static"] is None
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["fused"], out["text"], atol=1e-6)


def test_without_shots_auto_keeps_the_memory_of_dmn(stream: Path, tmp_path: Path) -> None:
    kept = []
    for method in ("auto", "dmn"):
        replayed(stream, "--method", method, "--shots", 0, "--seed", 3, "--out", tmp_path / "out.npz")
        with np.load(tmp_path / "out.npz") as out:
            assert ("statistics" in out.files) == (method == "auto")
            kept.append({name: out[name] for name in ("text", "dynamic", "slot", "counts", "entropies")})
    for name, array in kept[0].items():
        np.testing.assert_array_equal(array, kept[1][name])


def test_a_method_that_is_none_is_refused_with_status_2(stream: Path) -> None:
    result = CliRunner().invoke(main.app, ["replay", str(stream), "--method", "best"])
    assert result.exit_code == 2
    assert "'dmn'" in result.stderr
    assert result.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gain"), [("dtd", 5.0), ("oxford_pets_subset", 2.0)])
def test_real_streams_gain_and_stay_calibrated(name: str, gain: float) -> None:
    path = STREAMS / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no real data: {name}.npz is not beside this repository")
    told = replayed(path, "--method", "auto", "--shots", 0, "--orders", 5)
    assert told["gain"]["mean"] >= gain
    assert told["ece"]["fused"] <= told["ece"]["text"] + 2.0
