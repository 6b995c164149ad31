"""The data sets of the paper, on tiny folders of the same layout."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from core.encoders import openclip
from service.errors import InvalidRequest
from service.evaluation import commands
from service.evaluation.paper_datasets import PAPER, Known, chosen
from service.evaluation.report import paper_sheet
from service.evaluation.run import Plan
from service.settings import Settings
from tests.support.fakes import FakeEncoder, picture

NAMES = ("red", "green", "blue")
SYNSETS = ("n01", "n02", "n03")
BY_NAME = {known.name: known for known in PAPER}
SPLITS = [known for known in PAPER if known.labels.startswith("split_zhou_")]
IMAGENETS = [known for known in PAPER if known.labels == "classnames.txt"]

_seeds = itertools.count()


@pytest.fixture(autouse=True)
def _encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(openclip, "load", lambda *_, **__: FakeEncoder())
    return


def show(path: Path, colour: str) -> None:
    """Write a picture of a colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(colour, next(_seeds)))


def make_split(known: Known, root: Path, *, count: int = 3) -> dict[str, list[Any]]:
    """Make a data set with a split file, and return what is in that file."""
    split: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for (part, items), (label, name) in itertools.product(split.items(), enumerate(NAMES)):
        for n in range(count):
            items.append([f"{part}/{name}/{n}.jpg", label, name])
            show(root / known.folder / known.images / items[-1][0], name)
    write(root / known.folder / known.labels, json.dumps(split))
    return split


def make_lists(root: Path) -> None:
    """Make the aircraft: pictures by number, and lists that say which is what."""
    folder, numbers = root / "fgvc_aircraft", itertools.count()
    for part in ("train", "val", "test"):
        lines = []
        for name, _ in itertools.product(NAMES, range(2)):
            lines.append(f"{next(numbers):07} {name} 7-200")
            show(folder / "images" / f"{lines[-1].split()[0]}.jpg", name)
        write(folder / f"images_variant_{part}.txt", "\n".join(lines))
    write(folder / "variants.txt", "".join(f"{name} 7-200\n" for name in NAMES))


def make_imagenet(known: Known, root: Path, *, present: tuple[int, ...] = (0, 1, 2)) -> None:
    """Make one of the ImageNets, with folders for some of the classes."""
    folder = root / known.folder
    for label in present:
        own = str(label) if known.name == "ImageNetV2" else SYNSETS[label]
        for n in range(2):
            show(folder / known.images / own / f"{n}.JPEG", NAMES[label])
    lines = [f"{synset} {name} thing" for synset, name in zip(SYNSETS, NAMES, strict=True)]
    write(folder / "classnames.txt", "\n".join(lines))


def make_training(root: Path) -> None:
    for synset, name in zip(SYNSETS, NAMES, strict=True):
        for n in range(4):
            show(root / "imagenet/images/train" / synset / f"{n}.JPEG", name)


def write(file: Path, text: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def evaluate(root: Path, *names: str, plan: Plan | None = None) -> dict[str, Any]:
    quiet = Console(file=io.StringIO())
    told, _ = asyncio.run(
        commands.evaluate_paper(Settings(store="memory"), root, names, plan or Plan(), quiet),
    )
    return told


def test_the_paper_has_eleven_data_sets_and_four_shifts_of_one() -> None:
    assert len({known.folder for known in PAPER}) == len(PAPER) == 11 + 4
    assert len(SPLITS) == 9
    assert len(IMAGENETS) == 5


@pytest.mark.parametrize("known", SPLITS, ids=lambda known: known.folder)
def test_a_split_file_says_what_to_classify_and_what_to_draw_shots_from(known: Known, tmp_path: Path) -> None:
    make_split(known, tmp_path)
    data = known.load(tmp_path, shots=False)
    assert [spec.name for spec in data.classes] == list(NAMES)
    assert [
        (one.path.relative_to(tmp_path / known.folder / known.images).parts[:2], one.label) for one in data.test
    ] == [(("test", name), label) for label, name in enumerate(NAMES) for _ in range(3)]
    assert data.train is not None
    assert all(one.path.is_file() for one in (*data.test, *data.train))
    told = evaluate(tmp_path, known.folder, plan=Plan(shots=2))
    assert told["data_sets"][known.name]["n"] == 9
    assert told["average"]["accuracy"]["fused"] == 100.0


def test_the_aircraft_are_read_from_lists(tmp_path: Path) -> None:
    make_lists(tmp_path)
    data = BY_NAME["FGVCAircraft"].load(tmp_path, shots=True)
    assert [spec.name for spec in data.classes] == [f"{name} 7-200" for name in NAMES]
    assert [one.label for one in data.test] == [0, 0, 1, 1, 2, 2]
    assert data.classes[0].prompts == ("a photo of a red 7-200, a type of aircraft.",)
    assert evaluate(tmp_path, plan=Plan(shots=1))["average"]["accuracy"]["text"] == 100.0


@pytest.mark.parametrize("known", IMAGENETS, ids=lambda known: known.folder)
def test_the_imagenets_are_folders_of_classes_with_a_list_of_names(known: Known, tmp_path: Path) -> None:
    make_imagenet(known, tmp_path)
    write(tmp_path / known.folder / known.images / "README.txt", "no picture")
    data = known.load(tmp_path, shots=False)
    assert [spec.name for spec in data.classes] == [f"{name} thing" for name in NAMES]
    assert len(data.classes[0].prompts) == 7
    assert evaluate(tmp_path, known.name)["data_sets"][known.name]["accuracy"]["text"] == 100.0


@pytest.mark.parametrize("known", IMAGENETS, ids=lambda known: known.folder)
def test_the_classes_of_an_imagenet_are_those_that_have_a_folder(known: Known, tmp_path: Path) -> None:
    make_imagenet(known, tmp_path, present=(2, 0))
    data = known.load(tmp_path, shots=False)
    assert [spec.name for spec in data.classes] == ["red thing", "blue thing"]
    assert [one.label for one in data.test] == [0, 0, 1, 1]


def test_numbered_folders_count_the_classes_in_the_order_of_the_names_and_not_of_the_folders(tmp_path: Path) -> None:
    """As strings, 10 comes before 2."""
    folder = tmp_path / "imagenetv2"
    for label in range(11):
        show(folder / "imagenetv2-matched-frequency-format-val" / str(label) / "0.jpeg", "red")
    write(folder / "classnames.txt", "\n".join(f"n{label:02} name {label}" for label in range(11)))
    data = BY_NAME["ImageNetV2"].load(tmp_path, shots=False)
    assert [one.path.parent.name for one in data.test] == [str(label) for label in range(11)]
    assert [spec.name for spec in data.classes] == [f"name {label}" for label in range(11)]


def test_shots_of_a_shifted_imagenet_come_from_imagenet_itself(tmp_path: Path) -> None:
    make_imagenet(BY_NAME["ImageNet-A"], tmp_path, present=(0, 2))
    with pytest.raises(InvalidRequest, match="imagenet/images/train"):
        evaluate(tmp_path, "ImageNet-A", plan=Plan(shots=1))
    make_training(tmp_path)
    told = evaluate(tmp_path, "ImageNet-A", plan=Plan(shots=1))
    assert told["data_sets"]["ImageNet-A"]["accuracy"]["static"] == 100.0
    assert told["data_sets"]["ImageNet-A"]["n"] == 4


def test_names_that_two_classes_share_are_told_apart_and_asked_for_alike(tmp_path: Path) -> None:
    known = BY_NAME["ImageNet"]
    make_imagenet(known, tmp_path)
    write(tmp_path / known.folder / known.labels, "n01 missile\nn02 missile\nn03 red fox\n")
    first, second, third = known.load(tmp_path, shots=False).classes
    assert [first.name, second.name, third.name] == ["missile (n01)", "missile (n02)", "red fox"]
    assert first.prompts == second.prompts
    assert "art of the missile." in first.prompts


def test_descriptions_beside_a_data_set_join_its_templates(tmp_path: Path) -> None:
    known = BY_NAME["DTD"]
    make_split(known, tmp_path)
    write(tmp_path / "dtd" / "descriptions.json", json.dumps({"red": ["Something warm."], "other": []}))
    data = known.load(tmp_path, shots=False)
    assert data.classes[0].prompts == ("red texture.", "Something warm.")
    assert data.classes[1].prompts == ("green texture.",)
    write(tmp_path / "dtd" / "descriptions.json", json.dumps({"red": "Something warm."}))
    with pytest.raises(InvalidRequest, match="descriptions"):
        known.load(tmp_path, shots=False)


def test_what_is_not_there_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    make_split(BY_NAME["DTD"], tmp_path)
    write(tmp_path / "eurosat/split_zhou_EuroSAT.json", "{}")
    told = evaluate(tmp_path)
    assert list(told["data_sets"]) == ["DTD"]
    assert len(told["missing"]) == 14
    assert told["missing"]["EuroSAT"] == str(tmp_path / "eurosat/2750")
    with pytest.raises(InvalidRequest, match=r"Not found: UCF101 \(.*ucf101"):
        evaluate(tmp_path, "ucf101")


def test_data_sets_are_chosen_by_name_or_folder() -> None:
    assert [known.name for known in chosen(["DTD", " imagenet-rendition", "dtd"])] == ["DTD", "ImageNet-R"]
    assert chosen([]) == PAPER
    with pytest.raises(InvalidRequest, match="'cifar'"):
        chosen(["cifar"])


def test_the_table_has_a_row_a_data_set_and_their_average(tmp_path: Path) -> None:
    make_split(BY_NAME["DTD"], tmp_path)
    make_imagenet(BY_NAME["ImageNet-R"], tmp_path)
    for n in range(3):
        show(tmp_path / "dtd/images/test/red" / f"{n}.jpg", "blue")
    told = evaluate(tmp_path, plan=Plan(seeds=range(2), kind="runs"))
    assert told["data_sets"]["DTD"]["accuracy"]["text"] == pytest.approx(100 * 6 / 9, abs=1e-3)
    assert told["average"]["accuracy"]["text"] == pytest.approx(50 * (1 + 6 / 9), abs=1e-3)
    console = Console(file=(file := io.StringIO()), width=200)
    console.print(paper_sheet(told).table())
    for word in ("DTD", "ImageNet-R", "average", "66.67", "100.00", "83.33", "gain"):
        assert word in file.getvalue()


GOOD = [[f"{name}/0.jpg", label, name] for label, name in enumerate(NAMES)]
BROKEN: dict[str, str | bytes] = {
    "no JSON": "{",
    "not UTF-8": b'{"train": ["\xff"]}',
    "nested without end": "[" * 100_000,
    "no object": "[]",
    "no test": json.dumps({"train": GOOD}),
    "no list": json.dumps({"train": GOOD, "test": {}}),
    "nothing to classify": json.dumps({"train": GOOD, "test": []}),
    "a gap in the labels": json.dumps({"train": [], "test": [GOOD[0], GOOD[2]]}),
    "labels from one": json.dumps({"train": [], "test": GOOD[1:]}),
    "a negative label": json.dumps({"train": [], "test": [["a.jpg", -1, "red"]]}),
    "a label that is no number": json.dumps({"train": [], "test": [["a.jpg", "0", "red"]]}),
    "a label that is a truth": json.dumps({"train": [], "test": [["a.jpg", False, "red"]]}),
    "a label too large to write": '{"train": [], "test": [["a.jpg", ' + "9" * 5000 + ', "red"]]}',
    "an item that is short": json.dumps({"train": [], "test": [["a.jpg", 0]]}),
    "two names for a label": json.dumps({"train": [["a.jpg", 0, "red"]], "test": [["a.jpg", 0, "green"]]}),
    "an empty name": json.dumps({"train": [], "test": [["a.jpg", 0, " "]]}),
    "half a character": '{"train": [], "test": [["a.jpg", 0, "\\ud800"]]}',
    "a path that leaves": json.dumps({"train": [], "test": [["../../secret.jpg", 0, "red"]]}),
    "an absolute path": json.dumps({"train": [], "test": [["/etc/passwd", 0, "red"]]}),
    "no path": json.dumps({"train": [], "test": [["", 0, "red"]]}),
    "a path with a zero": json.dumps({"train": [], "test": [["a\0.jpg", 0, "red"]]}),
    "a path with half a character": '{"train": [], "test": [["\\ud800.jpg", 0, "red"]]}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_split_file_is_refused_by_name_in_one_sentence(tmp_path: Path, content: str | bytes) -> None:
    known = BY_NAME["DTD"]
    make_split(known, tmp_path)
    write(tmp_path / known.folder / known.labels, content)
    with pytest.raises(InvalidRequest, match="split_zhou_DescribableTextures") as refused:
        known.load(tmp_path, shots=False)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("images_variant_test.txt", "0000001 unheard-of"),
        ("images_variant_test.txt", "../secret red 7-200"),
        ("images_variant_test.txt", b"\xff"),
        ("images_variant_train.txt", ""),
        ("variants.txt", ""),
    ],
)
def test_broken_lists_are_refused_by_name(tmp_path: Path, file: str, content: str | bytes) -> None:
    make_lists(tmp_path)
    write(tmp_path / "fgvc_aircraft" / file, content)
    with pytest.raises(InvalidRequest, match="variant"):
        BY_NAME["FGVCAircraft"].load(tmp_path, shots=False)


@pytest.mark.parametrize("content", ["n01 red\nn02\nn03 blue", "n01 red\nn02 green", "", b"n01 \xff"])
def test_broken_names_of_an_imagenet_are_refused_by_name(tmp_path: Path, content: str | bytes) -> None:
    known = BY_NAME["ImageNet-Sketch"]
    make_imagenet(known, tmp_path)
    write(tmp_path / known.folder / known.labels, content)
    with pytest.raises(InvalidRequest, match=r"classnames\.txt"):
        known.load(tmp_path, shots=False)


def test_an_imagenet_without_folders_is_refused(tmp_path: Path) -> None:
    known = BY_NAME["ImageNet"]
    make_imagenet(known, tmp_path, present=())
    (tmp_path / known.folder / known.images).mkdir(parents=True)
    with pytest.raises(InvalidRequest, match="no folders"):
        known.load(tmp_path, shots=False)


def test_pictures_that_a_split_file_names_and_that_are_not_there_are_listed(tmp_path: Path) -> None:
    known = BY_NAME["DTD"]
    make_split(known, tmp_path)
    (tmp_path / "dtd/images/test/red/0.jpg").unlink()
    told = evaluate(tmp_path)["data_sets"]["DTD"]
    assert told["n"] == 8
    assert len(told["failed"]) == 1
