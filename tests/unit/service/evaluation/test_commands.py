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
from typing import Any

import pytest
import torch
from rich.console import Console

from core.encoders import openclip
from core.evaluation.stream_orders import Kind
from service.domain.memory import Stamp
from service.errors import InvalidRequest
from service.evaluation import commands, run
from service.evaluation.commands import Answer
from service.evaluation.report import report_sheet
from service.evaluation.run import Plan, Recalling
from service.inference.results import Choice, Learned, Reading
from service.settings import Settings
from service.telemetry import logs
from tests.support.fakes import FakeEncoder, picture

PLAN = Plan()


@pytest.fixture(autouse=True)
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEncoder]:
    for name in list(os.environ):
        if name.upper().startswith("DMN_"):
            monkeypatch.delenv(name)
    made = FakeEncoder()
    monkeypatch.setattr(openclip, "load", lambda *_, **__: made)
    level = logs.logger.level
    logs.logger.setLevel(logging.WARNING)
    yield made
    logs.logger.setLevel(level)


def reading(*fused: float) -> Reading:
    choices = [Choice("abcdef"[index], index, p) for index, p in enumerate(fused)]
    top = tuple(sorted(choices, key=lambda choice: -choice.score))
    return Reading(
        probabilities=torch.tensor(fused),
        top=top,
        text=top[0],
        dynamic=top[0],
        static=None,
        statistics=None,
        learned=Learned(outcome="filled", label="a", entropy=0.0),
        explanation=None,
        stamp=Stamp(epoch=1, version=1),
        stale=False,
        due=False,
        laps=[],
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


def evaluate(*roots: Path, plan: Plan = PLAN, **settings: object) -> dict[str, Any]:
    made = Settings(store="memory", **settings)  # type: ignore[arg-type]
    report, _ = asyncio.run(commands.evaluate_folders(made, roots, plan, quiet()))
    return report


def test_an_answer_names_the_likeliest_classes_first() -> None:
    answer = Answer(reading=reading(0.2, 0.5, 0.3), error=None)
    assert answer.top(2) == [("b", pytest.approx(0.5)), ("c", pytest.approx(0.3))]
    assert len(answer.top(9)) == 3
    told = answer.json(1)
    assert (told["label"], told["error"]) == ("b", None)


def test_an_answer_that_failed_names_no_class() -> None:
    assert Answer(reading=None, error="why").json(3) == {"label": None, "top": [], "error": "why"}


def test_growth_is_told_after_each_tenth_of_the_stream(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red": ["red"] * 35, "green": ["green"] * 35})
    growth = evaluate(root)["memory"]["growth"]
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
    assert evaluate(root, plan=Plan(shots=1), max_images=2, queue_images=2, batch_images=2)["n"] == 6


def test_views_are_drawn_where_they_are_asked_for(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red": ["red"] * 2, "green": ["green"] * 2})
    assert evaluate(root, plan=Plan(views=4))["accuracy"]["text"] == 100.0


@pytest.mark.parametrize("shots", [0, 1])
def test_folders_whose_names_are_spelled_in_nfd_are_classes_like_others(tmp_path: Path, shots: int) -> None:
    name = unicodedata.normalize("NFD", "caf\u00e9 red")
    root = folder(tmp_path / "data", {name: ["red"] * 2, "green": ["green"] * 2})
    assert evaluate(root, plan=Plan(shots=shots))["accuracy"]["text"] == 100.0


def test_folders_whose_names_have_space_around_them_are_classes_like_others(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red ": ["red"] * 2, "green": ["green"] * 2})
    assert evaluate(root, plan=Plan(shots=1))["n"] == 2


def test_a_shot_that_cannot_be_read_ends_the_evaluation_with_its_name(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red": []})
    for n in range(2):
        (root / "red" / f"bad{n}.png").write_bytes(b"no picture")
    with pytest.raises(InvalidRequest, match=r"bad\d\.png"):
        evaluate(root, plan=Plan(shots=1))


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
    console.print(report_sheet(report).table())
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
    console.print(report_sheet(report).table())
    assert "data/[/red]/a.png" in file.getvalue()


# Several orders, domains, pictures of no class ------------------------------------------------------------------------


def test_several_orders_are_the_mean_of_what_each_seed_says_alone(tmp_path: Path) -> None:
    colours = ["red", "blue", "red", "red", "green"]
    root = folder(tmp_path / "data", {"red": colours, "green": ["green", "red", "green", "blue"], "blue": colours})
    alone = [evaluate(root, plan=Plan(shots=1, seeds=(seed,)))["accuracy"] for seed in range(3)]
    told = evaluate(root, plan=Plan(shots=1, seeds=range(3), kind="iid"))
    for branch, value in told["accuracy"].items():
        assert value == pytest.approx(sum(one[branch] for one in alone) / 3, abs=1e-3)
        assert told["worst_tenth"]["accuracy"][branch] == told["worst"]["accuracy"][branch]
    assert (told["orders"], told["stream"], told["shots"]) == (3, "iid", 1)


def test_over_several_orders_each_picture_is_encoded_once(tmp_path: Path, encoder: FakeEncoder) -> None:
    root = folder(tmp_path / "data", {"red": ["red"] * 6, "green": ["green"] * 5})
    evaluate(root, plan=Plan(shots=2, seeds=range(4), kind="runs"))
    warm_up = 1
    assert encoder.images == 11 + warm_up


def test_an_encoder_that_recalls_answers_as_it_did(encoder: FakeEncoder) -> None:
    recalling = Recalling(encoder)
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = recalling.encode_images(pixels[:3])
    assert recalling.encode_images(pixels[[4, 2, 0, 4]]).equal(encoder.encode_images(pixels[[4, 2, 0, 4]]))
    assert first.equal(encoder.encode_images(pixels[:3]))


def test_an_encoder_that_may_recall_no_more_encodes_again_and_says_the_same(
    encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_RECALLED_BYTES", 4 * encoder.dim)
    recalling = Recalling(encoder)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for own in (pixels[:1], pixels[1:], pixels):
        assert recalling.encode_images(own).equal(encoder.encode_images(own))
    assert encoder.images == (1 + 2 + 2) + (1 + 2 + 3)


def right_answers(*roots: Path, plan: Plan) -> list[bool]:
    """Return which answers of the text head are right, in the order of the stream."""
    _, courses = asyncio.run(commands.evaluate_folders(Settings(store="memory"), roots, plan, quiet()))
    ((course,),) = courses.values()
    right = course.right("text")
    assert right is not None
    return right.tolist()


def domains(root: Path) -> tuple[Path, Path]:
    """Return two domains of the same classes: in the first every picture is what it says, in the second none is."""
    good = folder(root / "good", {"red": ["red"] * 10, "green": ["green"] * 10})
    bad = folder(root / "bad", {"green": ["red"] * 10, "red": ["green"] * 10})
    return good, bad


def test_a_drift_over_several_folders_goes_from_one_to_the_next(tmp_path: Path) -> None:
    right = right_answers(*domains(tmp_path), plan=Plan(kind="drift", seeds=(3,)))
    assert right == [True] * 20 + [False] * 20


def test_several_folders_without_a_drift_are_mixed(tmp_path: Path) -> None:
    assert 5 <= sum(right_answers(*domains(tmp_path), plan=PLAN)[:20]) <= 15


def test_folders_with_other_classes_are_refused(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", {"red": ["red"], "green": ["green"]})
    other = folder(tmp_path / "other", {"red": ["red"], "blue": ["blue"]})
    with pytest.raises(InvalidRequest, match="blue"):
        evaluate(one, other)


@pytest.mark.parametrize("kind", ["runs", "zipf", "drift"])
def test_pictures_can_be_sent_in_any_order(tmp_path: Path, kind: Kind) -> None:
    root = folder(tmp_path / "data", {"red": ["red"] * 12, "green": ["green"] * 12})
    told = evaluate(root, plan=Plan(kind=kind))
    assert (told["orders"], told["stream"]) == (1, kind)
    assert told["n"] == (18 if kind == "zipf" else 24)


def test_pictures_of_no_class_are_told_apart_by_the_score_and_counted_in_no_accuracy(tmp_path: Path) -> None:
    """White looks like none of the classes; of three greens that are in a folder of reds none is right."""
    root = folder(tmp_path / "data", {"red": ["red"] * 9 + ["green"] * 3, "green": ["green"] * 12})
    strangers = [root.parent / f"{n}.png" for n in range(8)]
    for n, path in enumerate(strangers):
        path.write_bytes(picture("white", 100 + n))
    told = evaluate(root, plan=Plan(unknown=strangers))
    assert (told["n"], told["unknown"]["images"]) == (24, 8)
    assert told["accuracy"]["text"] == told["unknown"]["accuracy_without"]["text"] == 87.5
    assert told["unknown"]["accuracy"] == told["accuracy"]
    assert told["unknown"]["auroc"] > 99.0
    assert told["unknown"]["fpr95"] == 0.0
    assert sum(told["writes"].values()) == 24 + 8


def test_unknown_pictures_that_look_like_a_class_pass_for_it(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red": ["red"] * 12, "green": ["green"] * 12})
    (tmp_path / "stranger.png").write_bytes(picture("red", 500))
    told = evaluate(root, plan=Plan(unknown=[tmp_path / "stranger.png"]))
    assert told["unknown"]["fpr95"] == 100.0


def test_what_several_orders_say_is_shown_to_people(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red": ["red"] * 4, "green": ["green"] * 4})
    (tmp_path / "stranger.png").write_bytes(picture("white", 500))
    plan = Plan(seeds=range(2), kind="runs", unknown=[tmp_path / "stranger.png"])
    console = Console(file=(file := io.StringIO()), width=200)
    console.print(report_sheet(evaluate(root, plan=plan)).table())
    for word in (
        "2 orders (runs)",
        "worst tenth of the orders: text",
        "gain of fused over text",
        "1 images of no class",
        "AUROC",
    ):
        assert word in file.getvalue()


def test_shots_are_trained_on_before_the_stream(tmp_path: Path) -> None:
    """Offsets are the one thing that can move the text head."""
    colours = {"one": ["red"] * 9, "two": ["green"] * 9, "three": ["blue"] * 9}
    root = folder(tmp_path / "data", colours)
    plain = evaluate(root, plan=Plan(shots=4, seeds=range(2), kind="iid"))
    told = evaluate(root, plan=Plan(shots=4, seeds=range(2), kind="iid", train=True))
    assert "training" not in plain
    assert [(one["seed"], one["trained"]) for one in told["training"]] == [(0, True), (1, True)]
    assert told["ece"]["text"] != plain["ece"]["text"]
    console = Console(file=(file := io.StringIO()), width=200)
    console.print(report_sheet(told).table())
    assert "offsets trained in 2 of 2 orders" in file.getvalue()
    assert "the trained head" in file.getvalue()


def test_shots_that_cannot_be_trained_on_end_the_evaluation_with_the_reason(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"red": ["red"] * 4, "green": ["green"] * 4})
    with pytest.raises(InvalidRequest, match="shot"):
        evaluate(root, plan=Plan(shots=0, train=True))
