"""Figures for people: tables of a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

_MEASURES = {"accuracy": "accuracy %", "macro_accuracy": "mean over classes %", "ece": "calibration error %"}
_NAMES = {"text": "text (the frozen head)"}


def report_table(report: Mapping[str, Any]) -> Table:
    """Return the figures of an evaluation or a replay: a row a branch, and what else there is to say below."""
    title = f"{report['n']} images, {report['classes']} classes"
    columns = {header: report[name] for name, header in _MEASURES.items()}
    if "orders" in report:
        title += f", {report['orders']} orders ({report['stream']})"
        columns["worst %"] = report["worst"]["accuracy"]
        columns[f"first {report['first']['images']} %"] = report["first"]["accuracy"]
    table = Table("branch", *columns, title=title, title_justify="left")
    for branch in report["accuracy"]:
        table.add_row(_NAMES.get(branch, branch), *(_figure(column[branch]) for column in columns.values()))
    table.caption = "\n".join(_remarks(report))
    return table


def paper_table(report: Mapping[str, Any]) -> Table:
    """Return the accuracies of several data sets: a row each, and their average."""
    rows = report["data_sets"]
    branches = list(report["average"]["accuracy"])
    table = Table(
        "data set", "images", "classes", *(f"{branch} %" for branch in branches), "gain", title_justify="left"
    )
    for name, told in rows.items():
        table.add_row(name, str(told["n"]), str(told["classes"]), *_accuracies(told["accuracy"]))
    table.add_section()
    table.add_row("average", "", "", *_accuracies(report["average"]["accuracy"]))
    return table


def absence(root: Path, missing: Mapping[str, str]) -> str:
    """Return the sentence that says which data sets are not there, and where they were looked for."""
    return f"Not found under {root}: {', '.join(f'{name} ({path})' for name, path in missing.items())}."


def _accuracies(accuracy: Mapping[str, float | None]) -> list[str]:
    """Return every branch's accuracy, and the points that the fused answer has over the frozen head's."""
    text, fused = accuracy["text"], accuracy["fused"]
    gain = "-" if text is None or fused is None else f"{fused - text:+.2f}"
    return [*map(_figure, accuracy.values()), gain]


def _remarks(report: Mapping[str, Any]) -> list[str]:
    writes = ", ".join(f"{round(count, 1)} {name}" for name, count in report["writes"].items())
    told = [f"memory: {writes or 'untouched'}; {report['images_per_second']} images/s"]
    if "memory" in report:
        steps = " ".join(str(count) for count in report["memory"]["growth"])
        told.append(f"filled slots after each tenth: {steps} of {report['memory']['slots']}")
    if "unknown" in report:
        told.append(_unknown(report["unknown"]))
    if "gain" in report:
        told.append(_gain(report["gain"]))
    if report.get("failed"):
        first = escape(", ".join(list(report["failed"])[:3]))
        told.append(f"{len(report['failed'])} files could not be read: {first} …")
    return told


def _unknown(unknown: Mapping[str, Any]) -> str:
    now, before = (_figure(unknown[name]["fused"]) for name in ("accuracy", "accuracy_without"))
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
