"""What commands do without a server, beneath their options."""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from core import openclip
from service import logs, offline
from service.desk import Learned, Reading
from service.errors import InvalidRequest
from service.offline import Answer
from service.report import report_table
from service.settings import Settings
from service.stores.base import Stamp
from tests.fakes import FakeEncoder, picture


@pytest.fixture(autouse=True)
def _fake_encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.upper().startswith("DMN_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(openclip, "load", lambda name, *, device: FakeEncoder())  # noqa: ARG005 - its signature
    level = logs.logger.level
    logs.logger.setLevel(logging.WARNING)
    yield
    logs.logger.setLevel(level)


def reading(*fused: float) -> Reading:
    p = torch.tensor(fused)
    return Reading(
        names=tuple("abcdef"[: len(fused)]),
        fused=p,
        text=p,
        dynamic=p,
        static=None,
        learned=Learned(outcome="filled", label="a", entropy=0.0),
        explanation=None,
        stamp=Stamp(epoch=1, version=1),
        stale=False,
        due=False,
        timings={},
    )


def folder(root: Path, classes: dict[str, list[str]]) -> Path:
    seeds = itertools.count()
    for name, colours in classes.items():
        (root / name).mkdir(parents=True)
        for n, colour in enumerate(colours):
            (root / name / f"{n}.png").write_bytes(picture(colour, next(seeds)))
    return root


def quiet() -> Console:
    return Console(file=io.StringIO())


def evaluate(root: Path, *, shots: int = 0, seed: int = 0, views: int = 1, **settings: object) -> dict[str, object]:
    made = Settings(store="memory", **settings)  # type: ignore[arg-type]
    return asyncio.run(offline.evaluate(made, root, shots=shots, seed=seed, views=views, console=quiet()))


def test_an_answer_names_the_likeliest_classes_first() -> None:
    answer = Answer(reading=reading(0.2, 0.5, 0.3), error=None)
    assert answer.top(2) == [("b", pytest.approx(0.5)), ("c", pytest.approx(0.3))]
    assert len(answer.top(9)) == 3
    told = answer.json(1)
    assert (told["label"], told["error"]) == ("b", None)


def test_an_answer_that_failed_names_no_class() -> None:
    assert Answer(reading=None, error="why").json(3) == {"label": None, "top": [], "error": "why"}


def test_the_split_takes_every_file_once_and_knows_its_seed(tmp_path: Path) -> None:
    folders = {name: [tmp_path / name / str(n) for n in range(5)] for name in "abc"}
    support, stream = offline._split(folders, 2, seed=1)
    assert sorted(path for path, _ in (*support, *stream)) == sorted(path for own in folders.values() for path in own)
    assert [label for _, label in support] == ["a", "a", "b", "b", "c", "c"]
    assert all(path.parent.name == "abc"[label] for path, label in stream)
    assert offline._split(folders, 2, seed=1) == (support, stream)
    assert offline._split(folders, 2, seed=2) != (support, stream)


def test_classes_are_folders_by_name_without_hidden_ones(tmp_path: Path) -> None:
    folder(tmp_path, {"b": ["red"], "a": ["red"], ".hidden": ["red"], "empty": []})
    (tmp_path / "a" / "deeper").mkdir()
    (tmp_path / "a" / "deeper" / "X.JPG").write_bytes(b"")
    found = offline._folders(tmp_path)
    assert list(found) == ["a", "b"]
    assert [path.name for path in found["a"]] == ["0.png", "X.JPG"]


def test_growth_is_told_after_each_tenth_of_the_stream(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red": ["red"] * 35, "green": ["green"] * 35})
    growth = evaluate(root)["memory"]["growth"]  # type: ignore[index]
    assert growth == [7 * n for n in range(1, 11)]


def test_the_stream_is_the_same_with_calls_of_any_size(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red": ["red", "blue", "red"], "green": ["green", "red", "green", "blue"]})
    whole = evaluate(root)
    parts = evaluate(root, queue_images=2, batch_images=2)
    for told in (whole, parts):
        told.pop("images_per_second")
    assert parts == whole


def test_a_service_with_small_calls_can_be_evaluated(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red": ["red"] * 4, "green": ["green"] * 4})
    assert evaluate(root, shots=1, max_images=2, queue_images=2, batch_images=2)["n"] == 6


def test_views_are_drawn_where_they_are_asked_for(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red": ["red"] * 2, "green": ["green"] * 2})
    assert evaluate(root, views=4)["accuracy"]["text"] == 100.0  # type: ignore[index]


@pytest.mark.parametrize("shots", [0, 1])
def test_folders_whose_names_are_spelled_in_nfd_are_classes_like_others(tmp_path: Path, shots: int) -> None:
    name = unicodedata.normalize("NFD", "caf\u00e9 red")
    root = folder(tmp_path / "data", {name: ["red"] * 2, "green": ["green"] * 2})
    assert evaluate(root, shots=shots)["accuracy"]["text"] == 100.0  # type: ignore[index]


def test_folders_whose_names_have_space_around_them_are_classes_like_others(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red ": ["red"] * 2, "green": ["green"] * 2})
    assert evaluate(root, shots=1)["n"] == 2


def test_a_shot_that_cannot_be_read_ends_the_evaluation_with_its_name(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red": []})
    for n in range(2):
        (root / "red" / f"bad{n}.png").write_bytes(b"no picture")
    with pytest.raises(InvalidRequest, match=r"bad\d\.png"):
        evaluate(root, shots=1)


def test_figures_that_are_not_there_are_dashes() -> None:
    none = dict.fromkeys(("text", "dynamic", "static", "fused"))
    report = {
        "n": 1,
        "classes": 2,
        "accuracy": {**none, "text": 12.3456},
        "macro_accuracy": none,
        "ece": none,
        "writes": {},
        "images_per_second": None,
    }
    console = Console(file=(file := io.StringIO()), width=200)
    console.print(report_table(report))
    assert "12.35" in file.getvalue()
    assert "memory: untouched" in file.getvalue()


def test_a_report_shows_brackets_in_paths_as_they_are() -> None:
    none = dict.fromkeys(("text", "dynamic", "static", "fused"))
    report = {
        "n": 1,
        "classes": 2,
        "accuracy": none,
        "macro_accuracy": none,
        "ece": none,
        "writes": {},
        "images_per_second": 1.0,
        "failed": {"data/[/red]/a.png": "why"},
    }
    console = Console(file=(file := io.StringIO()), width=200)
    console.print(report_table(report))
    assert "data/[/red]/a.png" in file.getvalue()
