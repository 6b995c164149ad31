"""Streams with the right answers: those handed out with the project, and synthetic ones against the literal form."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.evaluation.replay import Options, Replay, replay, summary
from core.evaluation.stream_file import Stream, load_stream
from core.readout.projection import Projection
from tests.support import literal

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TOLERANCE = 2e-5


def _file(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no real data: {'/'.join(parts)} is not beside this repository")
    return path


def _per_class(entropies: np.ndarray, counts: np.ndarray) -> list[list[float]]:
    return [sorted(row[:count].tolist()) for row, count in zip(entropies, counts, strict=True)]


@pytest.mark.parametrize("name", ["zero_shot", "views", "shots", "projected"])
def test_a_golden_stream_gets_its_answers(name: str) -> None:
    path = _file("golden", f"{name}.npz")
    got = replay(load_stream(path), Options()).arrays()
    with np.load(path) as file:
        expected = {key.removeprefix("expected_"): file[key] for key in file.files if key.startswith("expected_")}
    for branch in {"text", "dynamic", "static"} & expected.keys():
        np.testing.assert_allclose(got[branch], expected[branch], rtol=0, atol=TOLERANCE, err_msg=branch)
    assert ("static" in got) == ("static" in expected)
    np.testing.assert_array_equal(got["counts"], expected["counts"])
    ours = _per_class(got["entropies"], got["counts"])
    theirs = _per_class(expected["entropies"], expected["counts"])
    for mine, right in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, right, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["zero_shot", "views", "shots", "projected"])
def test_a_golden_stream_gets_the_literal_answers(name: str) -> None:
    _compare(load_stream(_file("golden", f"{name}.npz")), first=60)


def test_the_texture_stream_gains_from_its_memory() -> None:
    stream = load_stream(_file("streams", "dtd.npz"))
    accuracies = summary(replay(stream, Options(shots=0, seed=0)), stream)["accuracy"]
    assert isinstance(accuracies, dict)
    assert 44.6 <= accuracies["text"] <= 44.9
    assert 46.0 <= accuracies["dynamic"] <= 47.5


# --- without any file -----------------------------------------------------------------------------------------------

CASES = {
    "zero-shot": {"views": 1, "shots": 0, "projected": False, "seed": 0},
    "views": {"views": 20, "shots": 0, "projected": False, "seed": 0},
    "shots": {"views": 1, "shots": 3, "projected": False, "seed": 0},
    "views, shots and offsets": {"views": 10, "shots": 2, "projected": True, "seed": 0},
}


def _synthetic(*, views: int, shots: int, projected: bool, seed: int) -> Stream:
    """Return a stream of 80 images of 6 classes, near each other as an encoder's features are."""
    rng = np.random.default_rng(seed)
    n, classes, dim = 80, 6, 24

    def near(centre: np.ndarray, spread: float) -> np.ndarray:
        noise = rng.standard_normal(centre.shape)
        moved = centre + spread * noise / np.linalg.norm(noise, axis=-1, keepdims=True)
        return moved / np.linalg.norm(moved, axis=-1, keepdims=True)

    common = near(np.zeros(dim), 1.0)
    text = near(np.tile(common, (classes, 1)), 0.2)
    images = near(text[rng.integers(0, classes, n)], 0.2)
    crops = near(np.tile(images[:, None], (1, views, 1)), 0.1)
    crops[:, 0] = images
    shot_labels = rng.permutation(np.repeat(np.arange(classes), shots))
    offsets = {
        field.name: _float32(0.15 * rng.standard_normal((classes, dim)) / dim**0.5) for field in fields(Projection)
    }
    return Stream(
        text=_float32(text),
        features=_float32(crops),
        labels=None,
        shots=_float32(near(text[shot_labels], 0.2)),
        shot_labels=torch.from_numpy(shot_labels),
        classnames=tuple(str(c) for c in range(classes)),
        projection=Projection(**offsets) if projected else None,
        slots=5,
        beta=5.5,
        tau=100.0,
    )


def _float32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _method(stream: Stream) -> literal.Method:
    classes, dim = stream.text.shape
    offsets = literal.no_offsets(classes, dim)
    if (given := stream.projection) is not None:
        offsets = literal.Offsets(**{f.name: getattr(given, f.name).numpy().astype(np.float64) for f in fields(given)})
    return literal.Method(
        text=stream.text.numpy().astype(np.float64),
        shots=[list(stream.shots[stream.shot_labels == c].numpy().astype(np.float64)) for c in range(classes)],
        offsets=offsets,
        slots=stream.slots,
        tau=stream.tau,
        beta=stream.beta,
    )


def _compare(stream: Stream, *, first: int = 1000, learn: bool = True) -> Replay:
    """Replay the first images and hold every number against the literal float64 form."""
    stream = replace(stream, features=stream.features[:first], labels=None)
    images = list(stream.features.numpy().astype(np.float64))
    answers, memory = literal.stream(_method(stream), images, learn=[learn] * len(images))
    result = replay(stream, Options(learn=learn))
    got = result.arrays()
    for branch in ("text", "dynamic", "static", "fused"):
        rows = [getattr(answer, branch) for answer in answers]
        if rows[0] is None:
            assert branch not in got
        else:
            np.testing.assert_allclose(got[branch], np.stack(rows), rtol=0, atol=TOLERANCE, err_msg=branch)
    if learn:
        assert got["slot"].tolist() == [answer.slot for answer in answers]
    for row, bank in zip(got["entropies"], memory.banks, strict=True):
        expected = [entry.entropy for entry in bank] + [0.0] * (stream.slots - len(bank))
        np.testing.assert_allclose(row, expected, rtol=0, atol=TOLERANCE)
    return result


@pytest.mark.parametrize("case", CASES)
def test_a_synthetic_stream_gets_the_literal_answers(case: str) -> None:
    stream = _synthetic(**CASES[case])  # type: ignore[arg-type]
    assert literal.certain(_method(stream), list(stream.features.numpy().astype(np.float64)), margin=4e-5)
    result = _compare(stream)
    assert all(count > 0 for count in result.writes.values())


@pytest.mark.parametrize("case", CASES)
def test_a_synthetic_stream_without_learning_gets_the_literal_answers(case: str) -> None:
    stream = _synthetic(**CASES[case])  # type: ignore[arg-type]
    result = _compare(stream, first=30, learn=False)
    assert not any(result.writes.values())
