"""`dmn train`: a folder in, held-out accuracy out, and a memory that any service takes in."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from core.training.recipe import DEFAULT_EPOCHS
from service.cli import output
from service.domain.memory import TenantRecord
from service.serialization import reader
from service.settings import DEFAULT_TENANT, Settings
from service.tenants.snapshots import bring_in
from service.wiring import open_rooms
from tests.support.fakes import FakeEncoder, picture
from tests.unit.service.cli.test_main import Run, refused
from tests.unit.service.cli.test_main import made_command as made_command  # noqa: PLC0414 - a fixture
from tests.unit.service.cli.test_main import run as run  # noqa: PLC0414 - a fixture

KINDS = {"kind a": "red", "kind b": "green", "kind c": "blue"}
FAST = ("--epochs", 5, "--learning-rate", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of five pictures a class, under names that say nothing of the colours."""
    for name, colour in KINDS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for seed in range(5):
            (tmp_path / "data" / name / f"{seed}.png").write_bytes(picture(colour, seed))
    return tmp_path / "data"


def test_a_folder_is_trained_on_and_its_worth_is_told(run: Run, folder: Path) -> None:
    told = run("train", folder, *FAST, "--json").json
    assert (told["classes"], told["shots"], told["encoder"]) == (3, 15, "fake")
    assert told["trained"] is True
    assert set(told["held_out"]["before"]) == set(told["held_out"]["after"]) == {"text", "static", "fused"}
    assert told["held_out"]["after"]["text"] >= told["held_out"]["before"]["text"]
    assert len(told["losses"]) == told["epochs"]
    assert told["out"] is None


def test_so_many_shots_of_each_class_are_drawn_by_the_seed(run: Run, folder: Path) -> None:
    first, again = (run("train", folder, *FAST, "--shots", 2, "--json").json for _ in range(2))
    other = run("train", folder, *FAST, "--shots", 2, "--seed", 4, "--json").json
    assert first["shots"] == 6
    assert first["losses"] == again["losses"] != other["losses"]


def test_the_memory_that_is_written_is_taken_in_by_a_service(run: Run, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "trained.safetensors"
    told = run("train", folder, *FAST, "--out", file, "--json").json
    assert told["bytes"] == file.stat().st_size
    stored = reader.read(file, settings=Settings())
    assert stored.record.training is not None
    assert stored.record.training.id == told["id"]
    assert stored.record.config.retention == "features"
    assert {one.image for own in stored.shots.values() for one in own} == {None}
    record = asyncio.run(_brought_in(file))
    assert record.training == stored.record.training
    assert record.labelling == record.due_labelling


async def _brought_in(file: Path) -> TenantRecord:
    async with open_rooms(Settings(store="memory"), FakeEncoder()) as rooms:
        record, _ = await bring_in(rooms, DEFAULT_TENANT, file)
        return record


def test_people_see_a_table_of_the_branches(run: Run, folder: Path, tmp_path: Path) -> None:
    ran = run("train", folder, *FAST, "--out", tmp_path / "file")
    assert ran.status == 0, ran.err
    for word in ("15 shots, 3 classes", "text (the frozen head)", "static", "fused", "held-out", "memory in"):
        assert word in ran.out


def test_one_picture_a_class_is_trained_on_without_an_exam(run: Run, folder: Path) -> None:
    ran = run("train", folder, *FAST, "--shots", 1)
    assert "none was held out" in ran.out


def test_the_defaults_are_those_of_the_method(run: Run, folder: Path) -> None:
    told = run("train", folder, "--json").json
    assert told["learning_rate"] == pytest.approx(1e-4 * 100 / FakeEncoder.logit_scale)
    assert told["epochs"] <= DEFAULT_EPOCHS == 20


def test_a_folder_that_cannot_be_trained_on_is_refused_in_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    assert "is no folder" in refused(run("train", tmp_path / "nowhere"))
    lonely = tmp_path / "lonely" / "one"
    lonely.mkdir(parents=True)
    (lonely / "1.png").write_bytes(picture("red", 1))
    assert "two classes" in refused(run("train", tmp_path / "lonely"))
    (folder / "kind a" / "9.png").write_bytes(b"no picture")
    assert "cannot be used" in refused(run("train", folder))


@pytest.mark.parametrize(
    "option",
    [
        ("--epochs", "0"),
        ("--epochs", "1001"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "2"),
        ("--seed", "-1"),
        ("--shots", "0"),
        ("--out", "/nowhere/at/all/file"),
    ],
)
def test_options_out_of_range_end_with_status_2(run: Run, folder: Path, option: tuple[str, str]) -> None:
    ran = run("train", folder, *option)
    assert ran.status == output.WRONG_INPUT
    assert not ran.out
