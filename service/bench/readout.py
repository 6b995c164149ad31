"""What an answer of the memory costs: this readout beside plainer forms of itself, and how it grows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from core.adaptive.adaptation import Adaptation
from core.adaptive.statistics import TEMPERATURES, Counted, Statistics
from core.classify import Sample, classify
from core.memory.bank import Slots
from core.memory.dynamic import DynamicMemory
from core.memory.static import Shots, StaticMemory
from core.prepared_banks import Shelves
from core.snapshot import DEFAULT_BETA, Snapshot

TAU = 100.0

REFRESH = 32
"""Counted images after which `auto` makes its directions anew, in a stream of a thousand."""

OURS = "this readout"
STEPS = ("dmn", "auto")
"""Methods whose whole step is measured."""

_SPREAD = 0.7
_COPIED = 1 << 28
_LEAST = 3
_LONG_S = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Sizes of a full memory: classes, dynamic slots and shots of each; and how many images are read together."""

    classes: int
    slots: int
    shots: int
    dim: int
    batch: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Class weights, full memories in half precision, and images, all near one direction, as an encoder's are."""

    problem: Problem
    snapshot: Snapshot
    x: Tensor

    @property
    def banks(self) -> list[Tensor]:
        """What the branches read, `c s d` in float32: text, shots and slots, and where there are shots these alone."""
        text, (dynamic, static) = self.snapshot.text[:, None], (self.snapshot.dynamic, self.snapshot.static)
        shots = torch.stack([own.keys for own in static.classes]).float()
        slots = torch.stack([own.keys for own in dynamic.classes]).float()
        whole = torch.cat((text, shots, slots), 1)
        return [whole, whole[:, : 1 + shots.shape[1]].contiguous()] if shots.shape[1] else [whole]

    @property
    def samples(self) -> list[Sample]:
        """The images as a step takes them."""
        return [Sample(views=x[None], id=f"image {at}") for at, x in enumerate(self.x)]


def drawn(problem: Problem) -> World:
    """Return a problem's random world; the same for the same problem."""
    generator = torch.Generator().manual_seed(problem.seed)
    common = normalize(torch.randn(problem.dim, generator=generator), dim=0)

    def near(*shape: int) -> Tensor:
        noise = normalize(torch.randn(*shape, problem.dim, generator=generator), dim=-1)
        return normalize(common + _SPREAD * noise, dim=-1)

    ids = tuple(f"slot {at}" for at in range(max(problem.slots, problem.shots)))
    nats = tuple(1.0 + at / 1000 for at in range(problem.slots))
    slots = (
        Slots(keys=near(problem.slots).half(), entropies=nats, ids=ids[: problem.slots]) for _ in range(problem.classes)
    )
    shots = (Shots(keys=near(problem.shots).half(), ids=ids[: problem.shots]) for _ in range(problem.classes))
    snapshot = Snapshot(
        text=near(problem.classes),
        dynamic=DynamicMemory(classes=tuple(slots), slots=problem.slots),
        static=StaticMemory(classes=tuple(shots)),
        tau=TAU,
    )
    return World(problem=problem, snapshot=snapshot, x=near(problem.batch))


# Plainer forms --------------------------------------------------------------------------------------------------------


def slot_by_slot(banks: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Return the scores of each bank by Eq. (8) to (11) as they stand, one slot after the other, in NumPy."""

    def unit(v: Any) -> Any:
        return v / np.sqrt(v @ v)

    def score(slots: Any, image: Any) -> Any:
        total = np.zeros_like(image)
        for slot in slots:
            key = unit(slot)
            total += np.exp(-DEFAULT_BETA * (1.0 - key @ image)) * key
        return TAU * (unit(total) @ image)

    return [
        torch.tensor(np.array([[score(slots, image) for slots in bank.numpy()] for image in x.numpy()]))
        for bank in banks
    ]


def class_by_class(banks: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Return the same, a class's slots as one matrix."""

    def score(slots: Tensor) -> Tensor:
        keys = normalize(slots, dim=-1)
        weights = torch.exp(-DEFAULT_BETA * (1.0 - x @ keys.T))
        return TAU * (normalize(weights @ keys, dim=-1) * x).sum(-1)

    return [torch.stack([score(slots) for slots in bank], -1) for bank in banks]


def whole(banks: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Return the same, the whole bank made of unit length and its slots summed for one image after the other."""

    def score(bank: Tensor, image: Tensor) -> Tensor:
        keys = normalize(bank, dim=-1)
        weights = torch.exp(-DEFAULT_BETA * (1.0 - keys @ image))
        return TAU * normalize((weights[..., None] * keys).sum(-2), dim=-1) @ image

    return [torch.stack([score(bank, image) for image in x]) for bank in banks]


def batched(banks: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Return the same, the whole bank made of unit length and all images as batched products."""
    return ready([normalize(bank, dim=-1) for bank in banks], x)


def ready(banks: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Return the same for banks that are of unit length already: similarities in one pass, sums in another."""

    def score(keys: Tensor) -> Tensor:
        weights = torch.exp(-DEFAULT_BETA * (1.0 - torch.einsum("csd,nd->ncs", keys, x)))
        sums = torch.einsum("ncs,csd->ncd", weights, keys)
        return TAU * torch.einsum("ncd,nd->nc", normalize(sums, dim=-1), x)

    return [score(keys) for keys in banks]


FORMS: Mapping[str, Callable[[Sequence[Tensor], Tensor], list[Tensor]]] = {
    "slot by slot": slot_by_slot,
    "class by class": class_by_class,
    "whole bank": whole,
    "batched": batched,
    "batched, of unit length before": ready,
}
"""What this readout is compared with; all but the last make slots of unit length on every call."""


# Measuring ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(problem: Problem, *, threads: int = 0, repeats: int = 15) -> dict[str, Any]:
    """Return what a readout takes beside plainer forms of it, how far they differ, and what it reads in that time."""
    with threaded(threads):
        world = drawn(problem)
        banks, x, shelves = world.banks, world.x, Shelves(world.snapshot)
        unit = [normalize(bank, dim=-1) for bank in banks]
        forms: dict[str, Callable[[], list[Tensor]]] = {
            OURS: lambda: [part for part in shelves.scores(x) if part is not None],
            **{name: partial(form, unit if form is ready else banks, x) for name, form in FORMS.items()},
        }
        block, room = torch.ones(_COPIED // 4), torch.empty(_COPIED // 4)
        calls: dict[str, Callable[[], object]] = {
            **forms,
            **steps(world, shelves),
            "one image": lambda: shelves.scores(x[:1]),
            "copy": lambda: room.copy_(block),
            "sum": block.sum,
        }
        # Nobody finds its bank in a cache: an encoder, which comes between two readouts, would have swept it out.
        seconds = medians(calls, repeats, before=block.sum)
        return {
            **asdict(problem),
            "threads": torch.get_num_threads(),
            "milliseconds": {name: 1e3 * seconds[name] for name in forms},
            "ratio": {name: seconds[name] / seconds[OURS] for name in FORMS},
            "difference": _differences(forms, banks, x),
            "one_image_ms": 1e3 * seconds["one image"],
            "times_faster_an_image": seconds["one image"] * problem.batch / seconds[OURS],
            "bytes_read": shelves.nbytes,
            "bytes_a_second": {
                "one image": shelves.nbytes / seconds["one image"],
                "copy": 2 * _COPIED / seconds["copy"],
                "sum": _COPIED / seconds["sum"],
            },
            "share_of_copy": shelves.nbytes / seconds["one image"] / (2 * _COPIED / seconds["copy"]),
            "step_images": min(problem.batch, REFRESH - 1),
            "step_ms": {name: 1e3 * seconds[name] for name in STEPS},
            "refresh_ms": 1e3 * seconds["refresh"],
        }


def medians(
    calls: Mapping[str, Callable[[], object]], repeats: int, *, before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Return the median seconds of each call, which take turns after one to warm up; long ones are repeated less.

    `before` is called before each, and not measured.
    """
    told: dict[str, list[float]] = {name: [] for name in calls}
    often = {}
    for name, call in calls.items():
        often[name] = max(_LEAST, min(repeats, int(_LONG_S / _timed(call))))
    for turn in range(max(often.values())):
        for name, call in calls.items():
            # Those that are repeated less are spread over the run, so that all meet every state of the machine.
            if len(told[name]) <= turn * often[name] // max(often.values()):
                before()
                told[name].append(_timed(call))
    return {name: statistics.median(seconds) for name, seconds in told.items()}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def threaded(number: int) -> Iterator[None]:
    """Let torch use so many threads; 0 leaves it its own choice."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _differences(
    forms: Mapping[str, Callable[[], list[Tensor]]], banks: Sequence[Tensor], x: Tensor
) -> dict[str, dict[str, float]]:
    """Return how far scores and probabilities of each form are from those in double precision."""
    truth = class_by_class([bank.double() for bank in banks], x.double())

    def furthest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))

    told = {}
    for name, form in forms.items():
        scores = [part.double() for part in form()]
        own, right = ([part.softmax(-1) for part in parts] for parts in (scores, truth))
        told[name] = {"score": furthest(scores, truth), "probability": furthest(own, right)}
    return told


def _grown(world: World) -> Adaptation:
    """Return an adaptation after 64 images, whose directions are made anew when 32 more were counted."""
    snapshot, seen = world.snapshot, drawn(replace(world.problem, classes=1, batch=2 * REFRESH)).x
    none = seen.new_zeros(len(seen), TEMPERATURES)
    rows = Counted(x=seen, responsibilities=(TAU * seen @ snapshot.text.T).softmax(-1), agreed=none, sure=none[:, 0])
    known = rows.added_to(Statistics.zeros(*snapshot.text.shape))
    return Adaptation.begin(snapshot.text, snapshot.static, TAU, known)


def steps(world: World, shelves: Shelves) -> dict[str, Callable[[], object]]:
    """Return all that is done with images whose features are known, by either method, and what `auto` does at times."""
    samples, grown = world.samples[: REFRESH - 1], _grown(world)

    def step(snapshot: Snapshot) -> None:
        shelves.advance(snapshot)
        classify(shelves, samples)

    return {
        "dmn": partial(step, world.snapshot),
        "auto": partial(step, replace(world.snapshot, adaptation=grown)),
        "refresh": lambda: grown.known(grown.statistics, anew=True),
    }


# Telling --------------------------------------------------------------------------------------------------------------


def table(told: dict[str, Any]) -> Table:
    """Return a row for each form, and below it what an image costs otherwise."""
    width = 1 + told["shots"] + told["slots"]
    title = f"{told['classes']} x {width} x {told['dim']}, {told['batch']} image(s), {told['threads']} thread(s)"
    figures = ("ms", "times as long", "scores off by", "probabilities off by")
    shown = Table("form", *figures, title=title, box=None, pad_edge=False, caption=_caption(told))
    for name, milliseconds in told["milliseconds"].items():
        off = told["difference"][name]
        ratio = f"{told['ratio'][name]:.1f}" if name in told["ratio"] else ""
        shown.add_row(name, f"{milliseconds:.3f}", ratio, f"{off['score']:.1e}", f"{off['probability']:.1e}")
    return shown


def draw(told: dict[str, Any], axes: Any) -> None:
    """Draw how long each form takes."""
    names, times = list(told["milliseconds"]), list(told["milliseconds"].values())
    axes.bar_label(axes.barh(names, times), [f" {each:.3g}" for each in times])
    axes.invert_yaxis()
    axes.set(xlabel=f"ms for {told['batch']} image(s)", xscale="log")


def _caption(told: dict[str, Any]) -> str:
    rates, step = told["bytes_a_second"], told["step_ms"]
    return (
        f"One image alone takes {told['one_image_ms']:.3f} ms; one of {told['batch']} together is "
        f"{told['times_faster_an_image']:.1f} times as fast. "
        f"Alone it reads {told['bytes_read'] / 1e6:.1f} MB at {rates['one image'] / 1e9:.1f} GB/s, "
        f"{100 * told['share_of_copy']:.0f} % of what a copy moves (read and written {rates['copy'] / 1e9:.1f} GB/s; "
        f"a sum reads {rates['sum'] / 1e9:.1f}). "
        f"The whole step of {told['step_images']} image(s) takes {step['dmn']:.3f} ms with dmn and {step['auto']:.3f} "
        f"with auto, which makes its directions anew at times ({told['refresh_ms']:.3f} ms)."
    )
