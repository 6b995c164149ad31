"""What the command line does without a server: the same rooms, without the porch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from core.encoders.protocol import Encoder
from core.evaluation.replay import Options, summary
from core.evaluation.replay import replay as run_replay
from core.evaluation.stream_file import load_stream
from core.evaluation.stream_orders import Kind, order_of
from core.readout.fusion import BranchWeights
from service.classify import Fault
from service.concurrency.worker_thread import choose_device
from service.domain.tenant import ClassSpec, TenantConfig
from service.errors import InvalidRequest
from service.inference.results import Reading
from service.settings import DEFAULT_TENANT, Settings
from service.tenants.configuration import put_tenant
from service.wiring import load_encoder, open_rooms

from .aggregate import Course, average, together
from .datasets import DataSet, class_folders
from .paper_datasets import chosen
from .report import absence
from .run import Plan, Recalling, ask, call_size, evaluate, parts, read


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One file's answer: its reading, or what was wrong with it."""

    reading: Reading | None
    error: str | None

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the k likeliest classes and their probabilities."""
        return [] if self.reading is None else [(one.label, one.score) for one in self.reading.top[:k]]

    def json(self, k: int) -> dict[str, object]:
        """Return the answer as plain values."""
        top = [{"label": label, "score": score} for label, score in self.top(k)]
        return {"label": top[0]["label"] if top else None, "top": top, "error": self.error}


def loaded_encoder(settings: Settings, console: Console) -> dict[str, object]:
    """Return what an encoder is, once it is loaded.

    Raises:
        EncoderUnavailable: it cannot be had.
    """
    with _progress(console) as progress:
        encoder = _loaded(settings, progress)
    return {
        "encoder": encoder.name,
        "fingerprint": encoder.fingerprint,
        **encoder.origin,
        "logit scale": round(encoder.logit_scale, 4),
        "device": str(encoder.device),
    }


async def classify_files(
    settings: Settings, paths: Sequence[Path], names: Sequence[str], console: Console
) -> list[tuple[Path, Answer]]:
    """Return the answers to image files, in order, with a memory that starts empty."""
    results: list[tuple[Path, Answer]] = []
    with _progress(console) as progress:
        encoder = _loaded(settings, progress)
        async with open_rooms(settings, encoder) as rooms:
            config = TenantConfig(classes=tuple(ClassSpec(name=name) for name in names))
            await put_tenant(rooms, DEFAULT_TENANT, config)
            advance = _announce(progress, "Classifying", len(paths))
            for part in parts(paths, call_size(settings)):
                for path, result in zip(
                    part, await ask(rooms, [read(path) for path in part], top_k=len(names)), strict=True
                ):
                    results.append((path, _answer(result)))
                advance(len(part))
    return results


async def evaluate_folders(
    settings: Settings, directories: Sequence[Path], plan: Plan, console: Console
) -> tuple[dict[str, Any], dict[str, list[Course]]]:
    """Return the figures of folders of class folders, streamed together, and the courses behind them by their name.

    Raises:
        InvalidRequest: there are no class folders with images, or a class has no more files than shots.
    """
    data = class_folders(directories)
    with _progress(console) as progress:
        encoder = _loaded(settings, progress)
        told, courses = await _evaluated(settings, encoder, data, plan, progress)
    return told, {data.name: courses}


async def evaluate_paper(
    settings: Settings, root: Path, names: Sequence[str], plan: Plan, console: Console
) -> tuple[dict[str, Any], dict[str, list[Course]]]:
    """Return the figures of the paper's data sets under a root, and the courses behind them, by data set.

    Raises:
        InvalidRequest: there is none of them, there are none of such names, or one is broken.
    """
    wanted = chosen(names)
    absent = {known.name: known.missing(root, shots=plan.shots > 0) for known in wanted}
    found = [known.load(root, shots=plan.shots > 0) for known in wanted if absent[known.name] is None]
    missing = {name: str(path) for name, path in absent.items() if path is not None}
    if not found:
        raise InvalidRequest(absence(missing))
    told, courses = {}, {}
    with _progress(console) as progress:
        encoder = _loaded(settings, progress)
        for data in found:
            told[data.name], courses[data.name] = await _evaluated(settings, encoder, data, plan, progress)
    return {"data_sets": told, "average": average(list(told.values())), "missing": missing}, courses


def replay_file(
    path: Path, options: Mapping[str, Any], weights: BranchWeights, output: Path | None, console: Console
) -> dict[str, object]:
    """Return the figures of a stream file; write its answers to `output` if given.

    Raises:
        InvalidStream: the file does not hold a stream.
    """
    stream = load_stream(path)
    with _progress(console) as progress:
        task = progress.add_task("Replaying", total=len(stream.features))
        with torch.inference_mode():
            result = run_replay(
                stream, Options(weights=weights, **options), progress=lambda n: progress.advance(task, n)
            )
    if output is not None:
        with output.open("wb") as file:
            np.savez(file, **cast("dict[str, Any]", result.arrays()))
    return summary(result, stream)


def replay_orders(
    path: Path,
    options: Mapping[str, Any],
    weights: BranchWeights,
    *,
    kind: Kind,
    seeds: Sequence[int],
    console: Console,
) -> dict[str, object]:
    """Return the figures of a stream file over one order a seed: their means, the worst, the gain.

    Raises:
        InvalidStream: the file does not hold a stream, or no labels where the kind of order is made by them.
    """
    stream = load_stream(path)
    orders = [order_of(kind, seed, n=len(stream.features), labels=stream.labels, text=stream.text) for seed in seeds]
    courses = []
    with _progress(console) as progress:
        task = progress.add_task(f"Replaying {len(orders)} orders", total=sum(len(order) for order in orders))
        for part in (stream.taken(order) for order in orders):
            with torch.inference_mode():
                result = run_replay(
                    part, Options(weights=weights, **options), progress=lambda n: progress.advance(task, n)
                )
            courses.append(
                Course(branches=result.marks, labels=part.labels, writes=result.writes, seconds=result.seconds)
            )
    n = round(sum(course.n for course in courses) / len(courses))
    return {"n": n, "classes": len(stream.text), **together(courses, kind)}


def answers_table(answers: Sequence[tuple[Path, Answer]], k: int) -> Table:
    """Return the answers for people."""
    table = Table("image", "answer", "probability", "next", box=None, pad_edge=False)
    for path, answer in answers:
        if answer.error is not None:
            table.add_row(escape(str(path)), "[red]error[/]", "", escape(answer.error))
            continue
        (label, score), *rest = answer.top(k)
        others = ", ".join(f"{name} {p:.1%}" for name, p in rest)
        table.add_row(escape(str(path)), escape(label), f"{score:.1%}", escape(others))
    return table


def _answer(result: Reading | Fault) -> Answer:
    if isinstance(result, Reading):
        return Answer(reading=result, error=None)
    return Answer(reading=None, error=str(result))


async def _evaluated(
    settings: Settings, encoder: Encoder, data: DataSet, plan: Plan, progress: Progress
) -> tuple[dict[str, Any], list[Course]]:
    again = len(plan.seeds) > 1 or bool(plan.unknown)
    async with open_rooms(settings, Recalling(encoder) if again else encoder) as rooms:
        return await evaluate(rooms, data, plan, lambda what, total: _announce(progress, f"{data.name}: {what}", total))


def _loaded(settings: Settings, progress: Progress) -> Encoder:
    """Return the encoder, and show meanwhile that something is under way: it may have to be fetched or built."""
    device = choose_device(settings.device)
    task = progress.add_task(f"Loading the encoder {settings.encoder}", total=None)
    encoder = load_encoder(settings, device)
    progress.remove_task(task)
    return encoder


def _announce(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    """Show one thing at a time."""
    for task in progress.task_ids:
        progress.remove_task(task)
    return partial(progress.advance, progress.add_task(what, total=total))


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)
