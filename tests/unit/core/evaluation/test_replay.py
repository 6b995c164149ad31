from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.errors import InvalidStream
from core.evaluation.replay import Options, replay, summary
from core.evaluation.stream_file import Stream, load_stream

Arrays = dict[str, NDArray[np.generic]]


def _arrays(n: int = 70, classes: int = 3, dim: int = 6, *, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(dim)
    labels = rng.integers(0, classes, n)
    text = 4 * common + rng.standard_normal((classes, dim))
    return {
        "text": text,
        "features": text[labels] + 0.7 * rng.standard_normal((n, dim)),
        "labels": labels,
        "shots": np.repeat(text, 2, 0) + 0.5 * rng.standard_normal((2 * classes, dim)),
        "shot_labels": np.repeat(np.arange(classes), 2),
        "classnames": np.array([f"class {c}" for c in range(classes)]),
        "slots": np.array(4),
        "beta": np.array(3.0),
        "logit_scale": np.array(50.0),
    }


def _load(folder: Path, arrays: Arrays) -> Stream:
    path = folder / "stream.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return load_stream(path)


def _without(arrays: Arrays, *names: str) -> Arrays:
    return {name: array for name, array in arrays.items() if name not in names}


# --- loading --------------------------------------------------------------------------------------------------------


def test_a_whole_file_is_loaded(tmp_path: Path) -> None:
    arrays = _arrays()
    stream = _load(tmp_path, arrays)
    assert stream.features.shape == (70, 1, 6)
    assert (stream.slots, stream.beta, stream.tau) == (4, 3.0, 50.0)
    assert stream.classnames == ("class 0", "class 1", "class 2")
    assert stream.labels is not None
    assert stream.labels.tolist() == arrays["labels"].tolist()
    assert stream.shot_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert stream.projection is None


def test_two_arrays_are_enough(tmp_path: Path) -> None:
    arrays = _arrays()
    stream = _load(tmp_path, {"text": arrays["text"], "features": arrays["features"]})
    assert stream.labels is None
    assert stream.shots.shape == (0, 6)
    assert stream.classnames == ("0", "1", "2")
    assert (stream.slots, stream.beta, stream.tau) == (50, 5.5, 100.0)


def test_features_text_and_shots_are_normalised(tmp_path: Path) -> None:
    stream = _load(tmp_path, _arrays())
    for rows in (stream.text, stream.features, stream.shots):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]))


def test_views_keep_their_order(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((5, 4, 6))
    stream = _load(tmp_path, {**_without(_arrays(), "labels"), "features": features})
    expected = features / np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(stream.features.numpy(), expected, atol=1e-6)


def test_an_offset_that_is_not_given_is_zero(tmp_path: Path) -> None:
    key = np.full((3, 6), 0.25)
    stream = _load(tmp_path, {**_arrays(), "projection_key": key})
    assert stream.projection is not None
    assert torch.equal(stream.projection.key, torch.full((3, 6), 0.25))
    for name in ("query", "value", "output", "text"):
        assert not getattr(stream.projection, name).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_any_numbers_are_features(tmp_path: Path, dtype: type[np.generic]) -> None:
    features = np.ones((70, 6)).astype(dtype)
    assert _load(tmp_path, {**_arrays(), "features": features}).features.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((2, 6))}, "zeros"),
        ({"features": np.full((2, 6), np.nan)}, "not finite"),
        ({"features": np.full((2, 6), np.inf)}, "not finite"),
        ({"features": np.ones((2, 5))}, "5 entries; expected 6"),
        ({"features": np.ones((2, 3, 5))}, "5 entries; expected 6"),
        ({"features": np.ones(6)}, "dimensions"),
        ({"features": np.ones((0, 6))}, "not empty"),
        ({"features": np.array([["a"] * 6] * 2)}, "expected numbers"),
        ({"features": np.ones((2, 6), complex)}, "expected numbers"),
        ({"text": np.zeros((3, 6))}, "zeros"),
        ({"text": np.ones((3, 2, 6))}, "dimensions"),
        ({"shots": np.zeros((6, 6))}, "zeros"),
        ({"shots": np.ones((6, 7))}, "7 entries; expected 6"),
        ({"shot_labels": np.array([0, 1])}, "expected 6 integers"),
        ({"shot_labels": np.array([0, 0, 1, 1, 2, 3])}, "outside 0 to 2"),
        ({"labels": np.full(70, -1)}, "outside 0 to 2"),
        ({"labels": np.zeros(70)}, "expected 70 integers"),
        ({"labels": np.zeros(3, int)}, "expected 70 integers"),
        ({"classnames": np.array(["a"])}, "expected 3 names"),
        ({"classnames": np.arange(3)}, "expected 3 names"),
        ({"projection_key": np.ones((3, 5))}, "3 x 6"),
        ({"projection_query": np.full((3, 6), np.nan)}, "finite"),
        ({"slots": np.array(-1)}, "at least 0"),
        ({"beta": np.array(np.nan)}, "finite"),
        ({"logit_scale": np.array([1.0, 2.0])}, "one finite number"),
        ({"beta": np.array("5")}, "one finite number"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(tmp_path: Path, change: Arrays, message: str) -> None:
    arrays = {**_arrays(), **change}
    if len(change.get("features", arrays["features"])) != 70 and "labels" not in change:
        arrays = _without(arrays, "labels")
    with pytest.raises(InvalidStream, match=message):
        _load(tmp_path, arrays)


@pytest.mark.parametrize("name", ["text", "features"])
def test_a_file_without_a_needed_array_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidStream, match=f"no array '{name}'"):
        _load(tmp_path, _without(_arrays(), name))


@pytest.mark.parametrize("name", ["shots", "shot_labels"])
def test_shots_and_their_labels_come_together(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidStream, match="either both"):
        _load(tmp_path, _without(_arrays(), name))


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidStream, match=r"stream\.npz: A row of 'features'"):
        _load(tmp_path, {**_without(_arrays(), "labels"), "features": np.zeros((2, 6))})


def test_a_value_beyond_float32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidStream, match="not finite"):
        _load(tmp_path, {**_without(_arrays(), "labels"), "features": np.full((2, 6), 1e300)})


def _a_single_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


def _an_archive_of_notes(suffix: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("text", "features"):
            archive.writestr(name + suffix, "a note")
    return file.getvalue()


def _a_cut_archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, **_arrays())  # type: ignore[arg-type]
    return file.getvalue()[:-100]


def _pickled() -> bytes:
    file = io.BytesIO()
    np.savez(file, text=np.array([object()]), features=np.ones((2, 6)))
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"hello", id="no archive"),
        pytest.param(_a_cut_archive(), id="cut short"),
        pytest.param(_pickled(), id="pickled"),
        pytest.param(_a_single_array(), id="a single array"),
        pytest.param(_an_archive_of_notes(""), id="an archive of other things"),
        pytest.param(_an_archive_of_notes(".npy"), id="an archive of other things named .npy"),
    ],
)
def test_what_is_no_stream_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "stream.npz"
    path.write_bytes(data)
    with pytest.raises(InvalidStream):
        load_stream(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidStream, match="cannot be read"):
        load_stream(tmp_path / "none.npz")


# --- replaying ------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_file_whatever_the_seed(tmp_path: Path) -> None:
    stream = _load(tmp_path, _arrays())
    plain, shuffled = replay(stream, Options()), replay(stream, Options(seed=3))
    torch.testing.assert_close(plain.text, shuffled.text, rtol=0, atol=1e-5)
    assert plain.static is not None
    assert shuffled.static is not None
    torch.testing.assert_close(plain.static, shuffled.static, rtol=0, atol=1e-5)
    assert not torch.allclose(plain.dynamic, shuffled.dynamic, atol=1e-3)


def test_a_seed_means_numpys_permutation(tmp_path: Path) -> None:
    stream = _load(tmp_path, _arrays())
    order = torch.from_numpy(np.random.default_rng(3).permutation(70))
    by_hand = replay(replace(stream, features=stream.features[order]), Options())
    seeded = replay(stream, Options(seed=3))
    torch.testing.assert_close(seeded.dynamic[order], by_hand.dynamic, rtol=0, atol=1e-6)
    assert torch.equal(seeded.slot[order], by_hand.slot)


def test_every_image_is_filled_replaced_or_rejected(tmp_path: Path) -> None:
    result = replay(_load(tmp_path, _arrays()), Options())
    assert set(result.writes) == {"filled", "replaced", "rejected"}
    assert sum(result.writes.values()) == 70
    assert result.writes["rejected"] == int((result.slot == -1).sum())
    counts = result.arrays()["counts"]
    assert counts.sum() == result.writes["filled"]
    assert counts.max() <= 4


def test_without_learning_nothing_is_stored(tmp_path: Path) -> None:
    result = replay(_load(tmp_path, _arrays()), Options(learn=False))
    assert result.writes == {"filled": 0, "replaced": 0, "rejected": 0}
    assert (result.slot == -1).all()
    assert result.arrays()["counts"].tolist() == [0, 0, 0]


def test_without_learning_each_image_is_read_as_the_first(tmp_path: Path) -> None:
    """The virtual insert: every image gets what it would get at the head of the stream."""
    stream = _load(tmp_path, _arrays(n=5))
    reading = replay(stream, Options(learn=False))
    for number in range(5):
        alone = replay(replace(stream, features=stream.features[number : number + 1], labels=None), Options())
        torch.testing.assert_close(reading.dynamic[number], alone.dynamic[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shots", [1, 2, 5, None])
def test_the_first_shots_of_each_class_are_taken(tmp_path: Path, shots: int | None) -> None:
    stream = _load(tmp_path, _arrays())
    kept = torch.cat([(stream.shot_labels == c).nonzero()[:shots, 0] for c in range(3)])
    fewer = replace(stream, shots=stream.shots[kept], shot_labels=stream.shot_labels[kept])
    ours, theirs = replay(stream, Options(shots=shots)), replay(fewer, Options())
    assert ours.static is not None
    assert theirs.static is not None
    torch.testing.assert_close(ours.static, theirs.static, rtol=0, atol=1e-6)


def test_no_shots_leave_the_static_branch_out(tmp_path: Path) -> None:
    result = replay(_load(tmp_path, _arrays()), Options(shots=0))
    assert result.static is None
    assert "static" not in result.arrays()
    torch.testing.assert_close(result.fused, (result.text + result.dynamic) / 2, rtol=0, atol=1e-6)


def test_options_override_the_file(tmp_path: Path) -> None:
    arrays = _arrays()
    stream = _load(tmp_path, arrays)
    ours = replay(stream, Options(slots=2, beta=9.0, weights=(1.0, 0.0, 0.0)))
    theirs = replay(_load(tmp_path, {**arrays, "slots": np.array(2), "beta": np.array(9.0)}), Options())
    assert torch.equal(ours.dynamic, theirs.dynamic)
    torch.testing.assert_close(ours.fused, ours.text)
    assert ours.arrays()["entropies"].shape == (3, 2)


def test_no_slots_at_all_reject_every_image(tmp_path: Path) -> None:
    result = replay(_load(tmp_path, _arrays()), Options(slots=0))
    assert result.writes == {"filled": 0, "replaced": 0, "rejected": 70}
    assert result.static is not None
    torch.testing.assert_close(result.dynamic, result.static, rtol=0, atol=1e-5)


def test_out_arrays_have_their_types_and_empty_slots_are_zero(tmp_path: Path) -> None:
    out = replay(_load(tmp_path, _arrays(n=3)), Options()).arrays()
    assert {name: out[name].dtype for name in ("text", "dynamic", "static", "fused")} == dict.fromkeys(
        ("text", "dynamic", "static", "fused"), np.float32
    )
    assert out["entropies"].shape == (3, 4)
    for count, row in zip(out["counts"], out["entropies"], strict=True):
        assert (row[:count] > -1e-6).all()  # a certain image has none, up to the eps of Eq. (4)
        assert not row[count:].any()


def test_progress_hears_of_every_image(tmp_path: Path) -> None:
    heard: list[int] = []
    replay(_load(tmp_path, _arrays(n=130)), Options(), progress=heard.append)
    assert sum(heard) == 130
    assert len(heard) > 1


# --- figures --------------------------------------------------------------------------------------------------------


def test_the_summary_has_its_figures(tmp_path: Path) -> None:
    stream = _load(tmp_path, _arrays())
    figures = summary(replay(stream, Options(shots=0)), stream)
    assert set(figures) == {"n", "classes", "accuracy", "macro_accuracy", "ece", "writes", "images_per_second"}
    assert (figures["n"], figures["classes"]) == (70, 3)
    for name in ("accuracy", "macro_accuracy", "ece"):
        measured = figures[name]
        assert isinstance(measured, dict)
        assert measured["static"] is None
        assert all(0 <= measured[branch] <= 100 for branch in ("text", "dynamic", "fused"))


def test_without_labels_the_summary_has_no_accuracy(tmp_path: Path) -> None:
    stream = _load(tmp_path, _without(_arrays(), "labels"))
    figures = summary(replay(stream, Options()), stream)
    assert figures["accuracy"] == dict.fromkeys(("text", "dynamic", "static", "fused"))
