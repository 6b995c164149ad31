"""Where labelled pictures come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.domain.tenant import ClassSpec
from service.errors import InvalidRequest
from service.evaluation.datasets import DataSet, Picture, class_folders, pictures_under


def data_set(counts: dict[str, int], train: dict[str, int] | None = None) -> DataSet:
    """Return a set with so many pictures of each class."""

    def pictures(numbers: dict[str, int], where: str) -> tuple[Picture, ...]:
        own = enumerate(numbers.items())
        return tuple(Picture(path=Path(where, name, str(n)), label=c) for c, (name, count) in own for n in range(count))

    return DataSet(
        name="made",
        classes=tuple(ClassSpec(name=name) for name in counts),
        test=pictures(counts, "test"),
        train=None if train is None else pictures(train, "train"),
    )


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def test_shots_are_taken_out_of_the_stream_and_the_seed_says_which() -> None:
    data = data_set({"a": 5, "b": 5, "c": 5})
    support, stream = data.drawn(2, seed=1)
    assert sorted((*support, *stream), key=lambda one: one.path) == sorted(data.test, key=lambda one: one.path)
    assert [picture.label for picture in support] == [0, 0, 1, 1, 2, 2]
    assert data.drawn(2, seed=1) == (support, stream)
    assert data.drawn(2, seed=2) != (support, stream)


def test_shots_of_a_set_with_training_pictures_leave_the_stream_whole() -> None:
    data = data_set({"a": 3, "b": 4}, train={"a": 5, "b": 1})
    support, stream = data.drawn(2, seed=0)
    assert [picture.label for picture in support] == [0, 0, 1]
    assert {picture.path.parts[0] for picture in support} == {"train"}
    assert set(stream) == set(data.test)


def test_a_class_without_a_picture_left_is_named() -> None:
    with pytest.raises(InvalidRequest, match="'b' has 2 files"):
        data_set({"a": 3, "b": 2}).drawn(2, seed=0)


def test_classes_are_folders_by_name_without_hidden_ones(tmp_path: Path) -> None:
    touch(tmp_path, "b/0.png", "a/0.png", "a/deeper/X.JPG", ".hidden/0.png", "empty/notes.txt")
    data = class_folders([tmp_path])
    assert [spec.name for spec in data.classes] == ["a", "b"]
    assert [(one.path.name, one.label) for one in data.test] == [("0.png", 0), ("X.JPG", 0), ("0.png", 1)]
    assert data.domains == 1


def test_several_folders_are_domains_of_the_same_classes(tmp_path: Path) -> None:
    roots = [touch(tmp_path / name, "a/0.png", "b/0.png") for name in ("one", "two")]
    data = class_folders(roots)
    assert [(one.label, one.domain) for one in data.test] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert data.domains == 2


def test_pictures_of_no_class_are_those_anywhere_below_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "0.png", "x/1.jpeg", "x/notes.txt")
    assert [path.name for path in pictures_under(tmp_path)] == ["0.png", "1.jpeg"]


@pytest.mark.parametrize("where", ["missing", "empty"])
def test_a_folder_without_pictures_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match=where):
        pictures_under(tmp_path / where)
