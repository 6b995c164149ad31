"""`dmn bench`: what a part measures is told whole, and what is absent is said to be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Table

from service.bench.output import Absent, tell
from service.errors import InvalidRequest


def table(told: dict[str, Any]) -> Table:
    shown = Table("figure", "value")
    shown.add_row("ratio", str(told["ratio"]))
    return shown


PART = SimpleNamespace(table=table, draw=lambda told, axes: axes.plot([0, told["ratio"]]))


def absent() -> dict[str, Any]:
    raise Absent("There is no such device.")


def test_figures_come_with_machine_date_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    tell(PART, lambda: {"ratio": 2.0}, as_json=True, plot=None)
    told = json.loads(capsys.readouterr().out)
    assert told["ratio"] == 2.0
    assert told["machine"].keys() >= {"processor", "cores", "threads", "torch"}
    assert told["date"] < "9999-12-31"
    assert told["command"]


def test_what_is_absent_is_skipped_and_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tell(PART, absent, as_json=True, plot=tmp_path / "plot.png")
    assert json.loads(capsys.readouterr().out)["skipped"] == "There is no such device."
    tell(PART, absent, as_json=False, plot=None)
    assert capsys.readouterr().out == "Not measured: There is no such device.\n"
    assert not list(tmp_path.iterdir())


def test_figures_are_drawn_and_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tell(PART, lambda: {"ratio": 2.0}, as_json=False, plot=tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["plot.jpg", "away/plot.png"])
def test_a_plot_without_a_place_is_refused_before_anything_is_measured(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="plot"):
        tell(PART, absent, as_json=True, plot=tmp_path / name)
