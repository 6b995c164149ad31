"""Reports: figures as words for a terminal and for Markdown, and curves as pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from core.evaluation.metrics import Marks
from service.errors import InvalidRequest
from service.evaluation import plots, report
from service.evaluation.aggregate import Course
from service.evaluation.plots import running
from service.evaluation.report import Sheet
from service.evaluation.run import Plan

SHEET = Sheet(
    title="What [it] said", columns=["branch", "a|b"], rows=[["text", "1.00"], ["fused", "2|3"]], remarks=["x_y"]
)


def course(n: int = 60, *, late: bool = False) -> Course:
    """Return a course whose fused answers are right, and whose text head's are, or only late ones."""
    labels = torch.zeros(n, dtype=torch.long)
    wrong = torch.zeros(n, dtype=torch.long)
    wrong[: n // 2] = late
    confidence = torch.full((n,), 0.5)
    text, fused = (Marks(predicted=predicted, confidence=confidence) for predicted in (wrong, labels))
    return Course(branches={"text": text, "static": None, "fused": fused}, labels=labels, writes={}, seconds=1.0)


def test_a_running_mean_looks_back_as_far_as_its_window() -> None:
    right = torch.tensor([True, False, True, True, False])
    assert running(right, 2).tolist() == [100.0, 50.0, 50.0, 100.0, 50.0]
    assert running(right, 9).tolist() == pytest.approx([100, 50, 200 / 3, 75, 60])


def test_markdown_has_a_row_a_branch_and_shows_signs_as_they_are() -> None:
    title, table, remark = SHEET.markdown().split("\n\n")
    assert title == r"What \[it\] said"
    assert table.splitlines() == [r"| branch | a\|b |", "| --- | --- |", "| text | 1.00 |", r"| fused | 2\|3 |"]
    assert remark == r"x\_y"


@pytest.mark.parametrize("several", [False, True])
def test_a_report_says_how_it_was_made_and_shows_its_curves(tmp_path: Path, several: bool) -> None:  # noqa: FBT001
    plan = Plan(shots=4, seeds=range(2, 5), kind="runs", views=3, method="dmn")
    courses = {"first": [course(), course(50, late=True)], **({"second [set]": [course()]} if several else {})}
    report.write(tmp_path / "my report.md", "dmn evaluate 'a b' --shots 4", "lite", plan, SHEET, courses)
    told = (tmp_path / "my report.md").read_text()
    assert "    dmn evaluate 'a b' --shots 4\n" in told
    for row in (
        "encoder | lite",
        "method | dmn",
        "shots a class | 4",
        "orders | 3",
        "seeds | 2 to 4",
        "stream | runs",
        "views an image | 3",
    ):
        assert f"| {row} |" in told
    assert SHEET.markdown() in told
    for n in range(1, 1 + len(courses)):
        assert f"(<my report-{n}.png>)" in told
        with Image.open(tmp_path / f"my report-{n}.png") as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 400


@pytest.mark.parametrize("title", ["$x_{", "\u8272", "a" * 300, "\\frac"])
def test_a_curve_is_drawn_whatever_the_pictures_are_called(tmp_path: Path, title: str) -> None:
    plots.draw(tmp_path / "a.png", title, [course()])
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("images", [1, 2, 19, 20, 21])
def test_a_short_stream_has_a_curve(tmp_path: Path, images: int) -> None:
    plots.draw(tmp_path / "a.png", "short", [course(images)])
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_stream_shorter_than_the_window_is_drawn_as_a_line(tmp_path: Path) -> None:
    inked = []
    for images in (1, 7, 20):
        plots.draw(tmp_path / "a.png", "short", [course(images)])
        with Image.open(tmp_path / "a.png") as picture:
            inked.append(sum(n for n, colour in picture.convert("RGB").getcolors(2**20) if colour == (11, 110, 79)))
    assert min(inked[1:]) > 2 * inked[0]  # of a single image only the legend shows


def test_curves_of_different_courses_differ(tmp_path: Path) -> None:
    for name, courses in {"a": [course()], "b": [course(late=True)], "c": [course(), course(late=True)]}.items():
        plots.draw(tmp_path / name, "the same title", courses)
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 3


@pytest.mark.parametrize("name", ["out.png", "out", "nowhere/out.md", "out folder.md"])
def test_a_report_without_a_place_is_refused_before_anything_is_measured(tmp_path: Path, name: str) -> None:
    (tmp_path / "out folder.md").mkdir()
    with pytest.raises(InvalidRequest, match="out"):
        report.check_place(tmp_path / name)
    report.check_place(tmp_path / "out.md")


def test_without_matplotlib_a_report_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidRequest, match=r"dmn-clip-service\[report\]"):
        report.check_place(tmp_path / "out.md")
