"""How fast image towers run: every backend and precision in turns, beside open_clip's model as it comes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from torch import Tensor

from core.encoders import openclip
from core.encoders.protocol import Preprocess
from core.encoders.towers.backends import Backend, Precision, Runtime
from core.errors import EncoderUnavailable
from service.concurrency.worker_thread import choose_device

from .images import photo
from .output import Absent

BACKENDS: tuple[Backend, ...] = get_args(Backend)
DTYPES: tuple[Precision, ...] = get_args(Precision)[1:]

PLAIN = "open_clip"
"""What the others are held against: `encode_image` in float32 on pictures that stand ready, normalised."""

_MADE = 32
_WARM_RUNS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured: an encoder, or a model of open_clip's with random weights; each batch size for so long."""

    encoder: str
    random: str
    backends: Sequence[Backend]
    dtypes: Sequence[Precision]
    batches: Sequence[int]
    seconds: float
    device: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Way:
    """One way from pixels to features; for the plain model the pixels are normalised beforehand."""

    about: dict[str, Any]
    encode: Callable[[Tensor], Tensor]
    prepare: Callable[[Tensor], Tensor]


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Return images a second of every way and batch size, over those of the plain model, and the least cosine to it.

    Raises:
        Absent: the device or the encoder is not here.
    """
    columns = SpinnerColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True) as progress, TemporaryDirectory() as folder:
        try:
            device = choose_device(plan.device)
            name = (
                openclip.write_random(plan.random, Path(folder) / "random.safetensors") if plan.random else plan.encoder
            )
            with _shown(progress, f"Loading {PLAIN}"):
                base, preprocess = _plain(name, device)
            ways, skipped = _ways(plan, name, device, Path(folder), progress)
        except (EncoderUnavailable, ValueError) as error:
            raise Absent(str(error)) from error
        rows: list[dict[str, Any]] = []
        for batch in plan.batches:
            with _shown(progress, f"Encoding batches of {batch}"), torch.inference_mode():
                rows += _in_turns([base, *ways], _pixels(batch, preprocess.size), plan.seconds, device)
    return {"encoder": plan.random or plan.encoder, "device": str(device), "rows": rows, "skipped_ways": skipped}


def table(told: dict[str, Any]) -> Table:
    """Return a row for each way and batch size."""
    skipped = [f"{one['backend']} in {one['dtype']}: {one['why']}" for one in told["skipped_ways"]]
    shown = Table(
        *("backend", "dtype", "batch", "images/s", f"over {PLAIN}", "least cosine"),
        title=f"{told['encoder']} on {told['device']}",
        caption="\n".join(f"Not measured: {one}" for one in skipped) or None,
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    for row in told["rows"]:
        figures = (f"{row['images_per_second']:.1f}", f"{row['ratio']:.2f}", f"{row['cosine']:.6f}")
        shown.add_row(row["backend"], row["dtype"], str(row["batch"]), *figures)
    return shown


def draw(told: dict[str, Any], axes: Any) -> None:
    """Draw the ratio to the plain model against the batch size."""
    ways = list(dict.fromkeys((row["backend"], row["dtype"]) for row in told["rows"]))
    for way in ways:
        own = [row for row in told["rows"] if (row["backend"], row["dtype"]) == way]
        axes.plot([row["batch"] for row in own], [row["ratio"] for row in own], marker="o", label=" ".join(way))
    axes.set(xlabel="batch size", ylabel=f"images a second over {PLAIN}'s", title=told["encoder"], xscale="log")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", frameon=False)


def _plain(name: str, device: torch.device) -> tuple[_Way, Preprocess]:
    encoder = openclip.load(name, device=device, runtime=Runtime(dtype="float32"))
    mean, std = (torch.tensor(of)[:, None, None] for of in (encoder.preprocess.mean, encoder.preprocess.std))
    way = _Way(
        about={"backend": PLAIN, "dtype": "float32"},
        encode=openclip.plain(name, device=device),
        prepare=lambda pixels: ((pixels / 255 - mean) / std).to(device),
    )
    return way, encoder.preprocess


def _ways(
    plan: Plan, name: str, device: torch.device, cache: Path, progress: Progress
) -> tuple[list[_Way], list[dict[str, Any]]]:
    """Return what can be measured, and what cannot with the reason."""
    ways, skipped = [], []
    for backend in plan.backends:
        for dtype in plan.dtypes:
            about = {"backend": backend, "dtype": dtype}
            runtime = Runtime(backend=backend, dtype=dtype, cache=cache, most=max(plan.batches))
            try:
                with _shown(progress, f"Loading {backend} in {dtype}"):
                    encoder = openclip.load(name, device=device, runtime=runtime)
            except EncoderUnavailable as error:
                skipped.append({**about, "why": str(error)})
            else:
                ways.append(_Way(about=about, encode=encoder.encode_images, prepare=lambda pixels: pixels))
    return ways, skipped


def _in_turns(ways: Sequence[_Way], pixels: Tensor, seconds: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the figures of each way: the medians of calls that were made in turns, the first way is the measure."""
    inputs = [way.prepare(pixels) for way in ways]
    features = [way.encode(own).to(torch.float32).cpu() for way, own in zip(ways, inputs, strict=True)]
    for _ in range(_WARM_RUNS):
        _times(ways, inputs, device)
    turns: list[list[float]] = []
    ends = time.perf_counter() + seconds
    while not turns or time.perf_counter() < ends:
        turns.append(_times(ways, inputs, device))
    medians = [statistics.median(own) for own in zip(*turns, strict=True)]
    for way, own, median in zip(ways, features, medians, strict=True):
        yield {
            **way.about,
            "batch": len(pixels),
            "calls": len(turns),
            "images_per_second": round(len(pixels) / median, 2),
            "ratio": round(medians[0] / median, 3),
            "cosine": round(float((own * features[0]).sum(1).min()), 7),
        }


def _times(ways: Sequence[_Way], inputs: Sequence[Tensor], device: torch.device) -> list[float]:
    """Return the seconds of one call of each way, made in a random order: whom one comes after matters."""
    times = [0.0] * len(ways)
    for i in random.sample(range(len(ways)), len(ways)):
        start = time.perf_counter()
        ways[i].encode(inputs[i])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times[i] = time.perf_counter() - start
    return times


def _pixels(n: int, size: int) -> Tensor:
    """Return n pictures as pixels, over and over the same few."""
    made = [np.array(Image.open(BytesIO(photo(seed, size)))) for seed in range(min(n, _MADE))]
    return torch.from_numpy(np.stack(list(islice(cycle(made), n)))).permute(0, 3, 1, 2).contiguous()


@contextmanager
def _shown(progress: Progress, what: str) -> Iterator[None]:
    task = progress.add_task(what, total=None)
    yield
    progress.remove_task(task)
