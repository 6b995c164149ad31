"""Figures for people: tables of a terminal, and a report as Markdown with curves beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from service.errors import InvalidRequest

from . import plots
from .aggregate import ADAPTED, FROZEN, Course
from .run import Plan

_MEASURES = {"accuracy": "accuracy %", "macro_accuracy": "mean over classes %", "ece": "calibration error %"}
_HEADS = {False: "text (the frozen head)", True: "text (the trained head)"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """A table of words, and what else there is to say below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str]

    def table(self) -> Table:
        """Return the sheet for a terminal."""
        told = Table(*self.columns, title=self.title, title_justify="left", caption=escape("\n".join(self.remarks)))
        for row in self.rows:
            told.add_row(*map(escape, row))
        return told

    def markdown(self) -> str:
        """Return the sheet as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        return "\n\n".join([_cell(self.title), table, *map(_cell, self.remarks)])


def report_sheet(report: Mapping[str, Any]) -> Sheet:
    """Return the figures of an evaluation or a replay: a row a branch."""
    title = f"{report['n']} images, {report['classes']} classes"
    columns = {header: report[name] for name, header in _MEASURES.items()}
    if "orders" in report:
        title += f", {report['orders']} orders ({report['stream']})"
        columns["worst %"] = report["worst"]["accuracy"]
        columns[f"first {report['first']['images']} %"] = report["first"]["accuracy"]
    rows = [
        [
            _HEADS["training" in report] if branch == FROZEN else branch,
            *(_figure(column[branch]) for column in columns.values()),
        ]
        for branch in report["accuracy"]
    ]
    return Sheet(title=title, columns=["branch", *columns], rows=rows, remarks=_remarks(report))


def paper_sheet(report: Mapping[str, Any]) -> Sheet:
    """Return the accuracies of several data sets: a row each, and their average."""
    average = report["average"]["accuracy"]
    rows = [
        [name, str(told["n"]), str(told["classes"]), *_accuracies(told["accuracy"])]
        for name, told in report["data_sets"].items()
    ]
    return Sheet(
        title=f"{len(rows)} data sets",
        columns=["data set", "images", "classes", *(f"{branch} %" for branch in average), "gain"],
        rows=[*rows, ["average", "", "", *_accuracies(average)]],
        remarks=[absence(report["missing"])] if report["missing"] else [],
    )


def absence(missing: Mapping[str, str]) -> str:
    """Return the sentence that says which data sets are not there, and where they were looked for."""
    return f"Not found: {', '.join(f'{name} ({path})' for name, path in missing.items())}."


def check_place(file: Path) -> None:
    """Return if a report can be written there: asked before hours are spent on what to write.

    Raises:
        InvalidRequest: it cannot, or its curves cannot be drawn.
    """
    if file.suffix.lower() != ".md":
        raise InvalidRequest(f"A report is a Markdown file with curves beside it; name it with .md at its end: {file}")
    if not file.parent.is_dir():
        raise InvalidRequest(f"The report {file} has no place: there is no folder {file.parent}.")
    if file.is_dir():
        raise InvalidRequest(f"The report {file} has no place: that is a folder.")
    plots.check_library()


def write(
    file: Path, command: str, encoder: str, plan: Plan, sheet: Sheet, courses: Mapping[str, Sequence[Course]]
) -> None:
    """Write a report: how it was made, the figures, and for each data set a curve in a PNG beside it."""
    pictures = {name: file.with_name(f"{file.stem}-{n}.png") for n, name in enumerate(courses, 1)}
    for name, picture in pictures.items():
        plots.draw(picture, name, courses[name])
    settings = Sheet(
        title="How it was measured:", columns=["setting", "value"], rows=_settings(encoder, plan), remarks=()
    )
    shown = [f"![Accuracy over the stream: {_cell(name)}](<{picture.name}>)" for name, picture in pictures.items()]
    parts = ["# Evaluation", f"    {command}", settings.markdown(), sheet.markdown(), *shown]
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _settings(encoder: str, plan: Plan) -> list[tuple[str, str]]:
    return [
        ("encoder", encoder),
        ("method", plan.method),
        ("shots a class", str(plan.shots)),
        ("trained on them", "yes" if plan.train else "no"),
        ("orders", str(len(plan.seeds))),
        ("seeds", f"{plan.seeds[0]} to {plan.seeds[-1]}"),
        ("stream", plan.kind or "iid"),
        ("views an image", str(plan.views)),
        ("images of no class", str(len(plan.unknown))),
    ]


def _accuracies(accuracy: Mapping[str, float | None]) -> list[str]:
    """Return every branch's accuracy, and the points that the fused answer has over the frozen head's."""
    text, fused = accuracy[FROZEN], accuracy[ADAPTED]
    gain = "-" if text is None or fused is None else f"{fused - text:+.2f}"
    return [*map(_figure, accuracy.values()), gain]


def _remarks(report: Mapping[str, Any]) -> list[str]:
    writes = ", ".join(f"{round(count, 1)} {name}" for name, count in report["writes"].items())
    told = [f"memory: {writes or 'untouched'}; {report['images_per_second']} images/s"]
    if "memory" in report:
        steps = " ".join(str(count) for count in report["memory"]["growth"])
        told.append(f"filled slots after each tenth: {steps} of {report['memory']['slots']}")
    if "training" in report:
        told.append(_training(report["training"]))
    if "unknown" in report:
        told.append(_unknown(report["unknown"]))
    if "gain" in report:
        told.append(_gain(report["gain"]))
    if "worst_tenth" in report:
        tenth = (f"{branch} {_figure(value)}" for branch, value in report["worst_tenth"]["accuracy"].items())
        told.append(f"accuracy in the worst tenth of the orders: {', '.join(tenth)}")
    if report.get("failed"):
        first = ", ".join(list(report["failed"])[:3])
        told.append(f"{len(report['failed'])} files could not be read: {first} …")
    return told


def _training(orders: Sequence[Mapping[str, Any]]) -> str:
    came = sum(bool(one["trained"]) for one in orders)
    others = "; in the others they would not have helped" if came < len(orders) else ""
    return f"offsets trained in {came} of {len(orders)} orders{others}"


def _unknown(unknown: Mapping[str, Any]) -> str:
    now, before = (_figure(unknown[name][ADAPTED]) for name in ("accuracy", "accuracy_without"))
    return (
        f"{unknown['images']} images of no class: AUROC {unknown['auroc']:.2f} %, {unknown['fpr95']:.2f} % of them "
        f"pass where 95 % of the known do; fused on the known {now}, without them {before}"
    )


def _gain(gain: Mapping[str, float | None]) -> str:
    if gain["mean"] is None:
        return "no gain can be told without labels"
    error = "" if gain["standard_error"] is None else f" ± {gain['standard_error']:.2f} (standard error)"
    return f"gain of fused over text: {gain['mean']:+.2f}{error} points, at worst {gain['worst']:+.2f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cell(text: str) -> str:
    """Return a text that Markdown shows as it is, in a table or a caption."""
    return "".join(f"\\{char}" if char in "|[]<>*_`\\" else char for char in " ".join(text.split()))
