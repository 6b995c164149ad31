"""What the command line does without a server: the same rooms, without the porch."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from core.fusion import BranchWeights
from core.measures import Figures, figures, marks
from core.orders import Kind, order_of
from core.replay import Options, load_stream, summary
from core.replay import replay as run_replay

from .adapt import LabelledImage, Shot, add_shots, load, put_tenant
from .app import open_rooms
from .classify import ClassifyCall, Fault, classify
from .desk import Reading
from .errors import InvalidRequest
from .evaluation import Course, together
from .images import ImageFault, ImageUnreadable
from .rooms import Rooms
from .settings import DEFAULT_TENANT, Settings
from .tenants import ClassSpec, TenantConfig, class_name

T = TypeVar("T")

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
_FOREVER = float("inf")
_CALL = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One file's answer: its reading, or what was wrong with it."""

    reading: Reading | None
    error: str | None

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the k likeliest classes and their probabilities."""
        if self.reading is None:
            return []
        scores, order = self.reading.fused.topk(min(k, len(self.reading.names)))
        return [(self.reading.names[c], score) for c, score in zip(order.tolist(), scores.tolist(), strict=True)]

    def json(self, k: int) -> dict[str, object]:
        """Return the answer as plain values."""
        top = [{"label": label, "score": score} for label, score in self.top(k)]
        return {"label": top[0]["label"] if top else None, "top": top, "error": self.error}


async def classify_files(
    settings: Settings, paths: Sequence[Path], names: Sequence[str], console: Console
) -> list[tuple[Path, Answer]]:
    """Return the answers to image files, in order, with a memory that starts empty."""
    results: list[tuple[Path, Answer]] = []
    with _progress(console) as progress:
        async with _opened(settings, progress) as rooms:
            await put_tenant(rooms, DEFAULT_TENANT, _config(names))
            task = progress.add_task("Classifying", total=len(paths))
            for part in _parts(list(paths), _call(settings)):
                for path, result in zip(part, await _ask(rooms, [_bytes(path) for path in part]), strict=True):
                    results.append((path, _answer(result)))
                progress.advance(task, len(part))
    return results


async def evaluate(
    settings: Settings, directory: Path, *, shots: int, seed: int, views: int, console: Console
) -> dict[str, Any]:
    """Return the figures of a folder of class folders, streamed in shuffled order.

    With `shots`, that many files of each class, chosen by the seed, are uploaded first and left out of the stream.

    Raises:
        InvalidRequest: the folder holds no class folders with images, or a class has no more files than shots.
    """
    folders = _folders(directory)
    support, stream = _split(folders, shots, seed)
    with _progress(console) as progress:
        async with _opened(settings, progress) as rooms:
            await put_tenant(rooms, DEFAULT_TENANT, _config(list(folders)))
            await _upload(rooms, support, progress)
            return await _stream(rooms, list(folders), stream, progress, shots=shots, views=views)


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


async def _stream(
    rooms: Rooms,
    names: Sequence[str],
    stream: Sequence[tuple[Path, int]],
    progress: Progress,
    *,
    shots: int,
    views: int,
) -> dict[str, Any]:
    readings: list[Reading] = []
    labels: list[int] = []
    failed: dict[str, str] = {}
    growth: list[int] = []
    filled, done = 0, 0
    task, start = progress.add_task("Classifying", total=len(stream)), time.perf_counter()
    for part in _parts(list(stream), _call(rooms.settings, views)):
        results = await _ask(rooms, [_bytes(path) for path, _ in part], views=views)
        for (path, label), result in zip(part, results, strict=True):
            done += 1
            if isinstance(result, Reading):
                readings.append(result)
                labels.append(label)
                filled += result.learned.outcome == "filled"
            else:
                failed[str(path)] = str(result)
            growth += [filled] * (len(growth) < 10 * done // len(stream))
        progress.advance(task, len(part))
    seconds = time.perf_counter() - start
    if not readings:
        raise InvalidRequest(f"No image could be read: {next(iter(failed.values()))}")
    config = (await load(rooms, DEFAULT_TENANT)).record.config
    return {
        "n": len(readings),
        "classes": len(names),
        "shots": shots,
        "encoder": rooms.encoder.name,
        **_measured(readings, torch.tensor(labels)),
        "writes": dict(Counter(reading.learned.outcome for reading in readings)),
        "memory": {"growth": growth, "slots": config.slots * len(names)},
        "failed": failed,
        "images_per_second": round(len(stream) / seconds, 1),
    }


def _measured(readings: Sequence[Reading], labels: torch.Tensor) -> Figures:
    columns: dict[str, torch.Tensor | None] = {
        "text": torch.stack([reading.text for reading in readings]),
        "dynamic": torch.stack([reading.dynamic for reading in readings]),
        "static": None,
        "fused": torch.stack([reading.fused for reading in readings]),
    }
    static = [reading.static for reading in readings if reading.static is not None]
    if static:
        columns["static"] = torch.stack(static)
    return figures({name: None if p is None else marks(p) for name, p in columns.items()}, labels)


def _answer(result: Reading | Fault) -> Answer:
    if isinstance(result, Reading):
        return Answer(reading=result, error=None)
    return Answer(reading=None, error=str(result))


async def _upload(rooms: Rooms, support: Sequence[tuple[Path, str]], progress: Progress) -> None:
    task = progress.add_task("Uploading shots", total=len(support)) if support else None
    for part in _parts(list(support), _call(rooms.settings)):
        labelled = [LabelledImage(label=label, image=_bytes(path)) for path, label in part]
        told, _ = await add_shots(rooms, DEFAULT_TENANT, labelled, deadline=_FOREVER)
        for (path, _label), shot in zip(part, told, strict=True):
            if not isinstance(shot, Shot):
                raise InvalidRequest(f"The shot {path} cannot be used: {shot}")
        if task is not None:
            progress.advance(task, len(part))


async def _ask(rooms: Rooms, images: list[bytes | ImageFault], *, views: int = 1) -> list[Reading | Fault]:
    call = ClassifyCall(tenant=DEFAULT_TENANT, images=images, learn=True, views=views, explain=False, deadline=_FOREVER)
    return await classify(rooms, call)


def _config(names: Sequence[str]) -> TenantConfig:
    return TenantConfig(classes=tuple(ClassSpec(name=name) for name in names))


def _folders(directory: Path) -> dict[str, list[Path]]:
    if not directory.is_dir():
        raise InvalidRequest(f"{directory} is no folder.")
    folders = {}
    for folder in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
        if files:
            name = class_name(folder.name)
            if name in folders:
                raise InvalidRequest(f"Two folders of {directory} are named {name!r}, apart from space and spelling.")
            folders[name] = files
    if not folders:
        raise InvalidRequest(f"{directory} holds no folders with images; each class needs one, named by the class.")
    return folders


def _split(
    folders: Mapping[str, list[Path]], shots: int, seed: int
) -> tuple[list[tuple[Path, str]], list[tuple[Path, int]]]:
    rng = random.Random(seed)  # noqa: S311 - an order, no secret
    support, stream = [], []
    for label, (name, files) in enumerate(folders.items()):
        if len(files) <= shots:
            raise InvalidRequest(f"The class {name!r} has {len(files)} files; --shots {shots} leaves none to classify.")
        mixed = rng.sample(files, len(files))
        support += [(path, name) for path in mixed[:shots]]
        stream += [(path, label) for path in mixed[shots:]]
    rng.shuffle(stream)
    return support, stream


def _bytes(path: Path) -> bytes | ImageFault:
    try:
        return path.read_bytes()
    except OSError as error:
        return ImageUnreadable(f"{path} cannot be read: {error.strerror}.")


def _call(settings: Settings, views: int = 1) -> int:
    """Return how many images to take at a time: no more than a call may hold, and the queue."""
    return max(1, min(_CALL, settings.max_images, settings.queue_images // views))


def _parts(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@asynccontextmanager
async def _opened(settings: Settings, progress: Progress) -> AsyncIterator[Rooms]:
    """Open the rooms, and show that something is under way: an encoder may have to be fetched or built."""
    task = progress.add_task(f"Loading the encoder {settings.encoder}", total=None)
    async with open_rooms(settings) as rooms:
        progress.remove_task(task)
        yield rooms


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)
