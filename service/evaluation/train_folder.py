"""`dmn train`: the pictures of a folder as shots, trained through the same rooms, without the porch."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from service.domain.memory import StoredMemory
from service.domain.records import Job, JobState
from service.domain.tenant import TenantConfig
from service.errors import InvalidRequest
from service.serialization import writer
from service.services import Rooms
from service.settings import DEFAULT_TENANT, Settings
from service.tenants import training
from service.tenants.configuration import load, put_tenant
from service.tenants.shots import LabelledImage, Shot, add_shots
from service.wiring import open_rooms

from .datasets import DataSet, Picture, class_folders
from .run import FOREVER, call_size, parts, read

BRANCHES = ("text", "static", "fused")
_LOOK_S = 0.1


async def train_folder(
    settings: Settings,
    directory: Path,
    options: training.Options,
    *,
    shots: int | None,
    output: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Return what training on a folder of class folders came to; write the memory to `output` if given.

    With `shots`, that many pictures of each class, chosen by the seed, are trained on; without, all of them.

    Raises:
        InvalidRequest: the folder holds no classes of pictures, or these cannot be trained on; says why.
    """
    data, began = class_folders([directory]), time.perf_counter()
    support = chosen(data, shots, options.seed)
    with _progress(console) as progress:
        task = progress.add_task(f"Loading the encoder {settings.encoder}", total=None)
        async with open_rooms(settings) as rooms:
            config = TenantConfig(classes=data.classes, templates=data.templates, retention="images")
            await put_tenant(rooms, DEFAULT_TENANT, config)
            await _upload(rooms, data, support, progress, task)
            result = await _trained(rooms, options, progress, task)
            if output is not None:
                stored = bare(await load(rooms, DEFAULT_TENANT))
                created = datetime.now(UTC).isoformat(timespec="seconds")
                result["bytes"] = await asyncio.to_thread(writer.write, stored, output, created=created)
            return {
                "encoder": rooms.encoder.name,
                "classes": len(data.classes),
                **result,
                "seconds": round(time.perf_counter() - began, 1),
                "out": None if output is None else str(output),
            }


def chosen(data: DataSet, shots: int | None, seed: int) -> list[Picture]:
    """Return the pictures to train on, class after class: so many of each as the seed draws them, or all."""
    rng = random.Random(seed)  # noqa: S311 - a choice of pictures, no secret
    found: list[Picture] = []
    for label in range(len(data.classes)):
        own = [picture for picture in data.test if picture.label == label]
        found += own if shots is None else rng.sample(own, min(shots, len(own)))
    return found


def bare(stored: StoredMemory) -> StoredMemory:
    """Return a memory without the images of its shots, which were kept for this training alone."""
    config = replace(stored.record.config, retention="features")
    shots = {own: tuple(replace(shot, image=None, kept=0) for shot in held) for own, held in stored.shots.items()}
    return replace(stored, record=replace(stored.record, config=config), shots=shots)


def result_table(result: Mapping[str, Any]) -> Table:
    """Return what a training came to, for people."""
    title = f"{result['shots']} shots, {result['classes']} classes"
    table = Table("branch", "before %", "after %", title=title, title_justify="left")
    held_out = result["held_out"] or {"before": {}, "after": {}}
    for branch in BRANCHES:
        row = [held_out[when].get(branch) for when in ("before", "after")]
        name = "text (the frozen head)" if branch == "text" else branch
        table.add_row(name, *("-" if value is None else f"{value:.2f}" for value in row))
    table.caption = _caption(result)
    return table


def _caption(result: Mapping[str, Any]) -> str:
    lines = ["on held-out shots" if result["held_out"] else "no class has two shots: none was held out"]
    if result["trained"]:
        lines.append(f"{result['epochs']} passes, seed {result['seed']}, {result['seconds']} s")
    else:
        lines.append(str(result["reason"]))
    if result["out"] is not None:
        lines.append(f"memory in {result['out']}")
    return "\n".join(lines)


async def _upload(rooms: Rooms, data: DataSet, support: Sequence[Picture], progress: Progress, task: TaskID) -> None:
    progress.update(task, description="Reading shots", total=len(support))
    for part in parts(support, call_size(rooms.settings)):
        labelled = [LabelledImage(label=data.classes[one.label or 0].name, image=read(one.path)) for one in part]
        told, _ = await add_shots(rooms, DEFAULT_TENANT, labelled, deadline=FOREVER)
        for picture, shot in zip(part, told, strict=True):
            if not isinstance(shot, Shot):
                raise InvalidRequest(f"The shot {picture.path} cannot be used: {shot}")
        progress.advance(task, len(part))


async def _trained(rooms: Rooms, options: training.Options, progress: Progress, task: TaskID) -> dict[str, Any]:
    """Train, show how it goes, and return the result.

    Raises:
        InvalidRequest: the shots cannot be trained on, or the training failed.
    """
    job = await training.start(rooms, DEFAULT_TENANT, options)
    progress.reset(task, description="Training", total=1.0)
    while not job.over:
        await rooms.jobs.wait(job.id, _LOOK_S)
        job = await rooms.jobs.get(DEFAULT_TENANT, job.id)
        progress.update(task, completed=job.progress, description=_how(job))
    if job.state is not JobState.DONE or job.result is None:
        raise InvalidRequest(str((job.error or {}).get("detail", "The training was cancelled.")))
    return dict(job.result)


def _how(job: Job) -> str:
    told = job.result or {}
    if told.get("phase") == "reading":
        return f"Reading crops of shot {told['shots']}"
    if "epoch" in told:
        return f"Pass {told['epoch']} of {told['epochs']}, loss {told['loss'] or 0:.3f}"
    return "Training"


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)
