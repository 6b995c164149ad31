"""Measuring: labelled pictures through the rooms, in one order or in several, and what they say together."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from core.encoders.protocol import Encoder
from core.evaluation.metrics import Marks, auroc, false_positive_rate
from core.evaluation.stream_orders import Kind, drift, mixed, order_of
from core.snapshot import Method
from service.classify import ClassifyCall, Fault, classify
from service.domain.tenant import Retention, TenantConfig
from service.errors import InvalidRequest
from service.images.errors import ImageFault, ImageUnreadable
from service.inference.results import Choice, Reading
from service.services import Rooms
from service.settings import DEFAULT_TENANT, Settings
from service.tenants import training
from service.tenants.configuration import delete_tenant, put_tenant
from service.tenants.shots import LabelledImage, Shot, add_shots

from .aggregate import ADAPTED, Course, mean, over, tail, together
from .datasets import DataSet, Picture

T = TypeVar("T")

BRANCHES = ("text", "dynamic", "static", "statistics", "fused")
"""What is measured of a reading."""

FOREVER = float("inf")
_CALL = 32
_TENTHS = 10
_RECALLED_BYTES = 1 << 30
_LOOK_S = 0.2
_HUNDRED = 100

Announce = Callable[[str, int], Callable[[int], None]]
"""Say what begins and how many images it takes; what is returned hears of those that are done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to measure: shots a class, one order a seed (which also draws the shots), views, and pictures of no class.

    `train` trains offsets on the shots before the stream. `method` is the tenant's. `kind` is None where one shuffled
    stream is measured alone.
    """

    shots: int = 0
    seeds: Sequence[int] = (0,)
    kind: Kind | None = None
    views: int = 1
    train: bool = False
    method: Method = "auto"
    unknown: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Walk:
    """A course of pictures through the rooms.

    `unknown` holds the fused scores of the pictures of no class, which the course is without; `growth` the filled
    slots after each tenth; `failed` why files could not be read; `training` what came of it, None where there was none.
    """

    course: Course
    unknown: Float[Tensor, " k"]
    growth: Sequence[int]
    failed: Mapping[str, str]
    training: Mapping[str, Any] | None = None


class Recalling:
    """An encoder that remembers what it saw, up to a limit: over several orders each picture is encoded once."""

    def __init__(self, encoder: Encoder) -> None:
        self.name, self.fingerprint, self.origin = encoder.name, encoder.fingerprint, encoder.origin
        self.dim, self.logit_scale = encoder.dim, encoder.logit_scale
        self.preprocess, self.device = encoder.preprocess, encoder.device
        self._encoder = encoder
        self._most = _RECALLED_BYTES // (encoder.dim * torch.float32.itemsize)
        self._known: dict[bytes, Tensor] = {}

    def encode_images(self, pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return the features of pictures, those seen before as they were."""
        keys = [hashlib.blake2b(one.contiguous().numpy(), digest_size=16).digest() for one in pixels.cpu()]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        fresh: dict[bytes, Tensor] = {}
        if new:
            features = self._encoder.encode_images(pixels[new])
            fresh = dict(zip((keys[i] for i in new), features, strict=True))
            if len(self._known) < self._most:
                self._known |= fresh
        return torch.stack([fresh[key] if key in fresh else self._known[key] for key in keys])

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Return the features of texts."""
        return self._encoder.encode_texts(texts)


async def evaluate(rooms: Rooms, data: DataSet, plan: Plan, announce: Announce) -> tuple[dict[str, Any], list[Course]]:
    """Return the figures of a data set, and the courses behind them.

    Raises:
        InvalidRequest: a class has too few pictures, a shot cannot be used, or nothing can be read.
    """
    walks = [await _walk(rooms, data, plan, seed, announce) for seed in plan.seeds]
    courses = [walk.course for walk in walks]
    report: dict[str, Any] = {
        "n": round(mean([course.n for course in courses])),
        "classes": len(data.classes),
        "shots": plan.shots,
        "encoder": rooms.encoder.name,
        **(courses[0].alone() if plan.kind is None else together(courses, plan.kind)),
        "memory": {
            "growth": [round(mean(filled)) for filled in zip(*(walk.growth for walk in walks), strict=False)],
            "slots": TenantConfig().slots * len(data.classes),
        },
        "failed": {path: why for walk in walks for path, why in walk.failed.items()},
        # Of the first order: later ones recall what it encoded.
        "images_per_second": round((courses[0].n + len(walks[0].unknown)) / courses[0].seconds, 1),
    }
    if plan.kind is not None:
        accuracies = [course.figures()["accuracy"] for course in courses]
        report["worst_tenth"] = {"accuracy": over(accuracies, tail)}
    if plan.train:
        report["training"] = [dict(walk.training or {}) for walk in walks]
    if plan.unknown:
        report["unknown"] = await _unknown(rooms, data, plan, walks, announce)
    return report, courses


async def _unknown(
    rooms: Rooms, data: DataSet, plan: Plan, walks: Sequence[Walk], announce: Announce
) -> dict[str, Any]:
    """Return how well the fused score tells the unknown from the known, and the known ones' accuracy without them."""
    calm = replace(plan, unknown=())
    without = [(await _walk(rooms, data, calm, seed, announce)).course for seed in plan.seeds]
    pairs = [(told.confidence, walk.unknown) for walk in walks if (told := walk.course.branches[ADAPTED]) is not None]
    return {
        "images": len(plan.unknown),
        "auroc": round(mean([auroc(known, unknown) for known, unknown in pairs]), 4),
        "fpr95": round(mean([false_positive_rate(known, unknown) for known, unknown in pairs]), 4),
        "accuracy": over([walk.course.figures()["accuracy"] for walk in walks], mean),
        "accuracy_without": over([course.figures()["accuracy"] for course in without], mean),
    }


async def _walk(rooms: Rooms, data: DataSet, plan: Plan, seed: int, announce: Announce) -> Walk:
    """Send a data set through the rooms, in one order, with a tenant that starts afresh."""
    support, known = data.drawn(plan.shots, seed)
    await delete_tenant(rooms, DEFAULT_TENANT)
    await put_tenant(rooms, DEFAULT_TENANT, _config(data, plan))
    await _upload(rooms, data, support, announce)
    told = await _trained(rooms, seed, announce) if plan.train else None
    stream = await _arranged(rooms, data, known, plan, seed)
    which = "" if len(plan.seeds) == 1 else f" order {plan.seeds.index(seed) + 1} of {len(plan.seeds)}"
    walk = await _stream(rooms, stream, announce(f"Classifying{which}", len(stream)), views=plan.views)
    return replace(walk, training=told)


def _config(data: DataSet, plan: Plan) -> TenantConfig:
    """Return the tenant's configuration: as a new one has it, with images kept where crops of them are trained on."""
    kept: Retention = "images" if plan.train else "features"
    return TenantConfig(classes=data.classes, templates=data.templates, retention=kept, method=plan.method)


async def _upload(rooms: Rooms, data: DataSet, support: Sequence[Picture], announce: Announce) -> None:
    advance = announce("Uploading shots", len(support)) if support else None
    for part in parts(support, call_size(rooms.settings)):
        labelled = [LabelledImage(label=data.classes[one.label or 0].name, image=read(one.path)) for one in part]
        told, _ = await add_shots(rooms, DEFAULT_TENANT, labelled, deadline=FOREVER)
        for picture, shot in zip(part, told, strict=True):
            if not isinstance(shot, Shot):
                raise InvalidRequest(f"The shot {picture.path} cannot be used: {shot}")
        if advance is not None:
            advance(len(part))


async def _trained(rooms: Rooms, seed: int, announce: Announce) -> Mapping[str, Any]:
    """Train the tenant's offsets on its shots, as `POST /memory/static/train` does, and return what came of it.

    Raises:
        InvalidRequest: the shots cannot be trained on, or the training failed.
    """
    advance, done = announce("Training", _HUNDRED), 0
    job = await training.start(rooms, DEFAULT_TENANT, training.Options(seed=seed))
    while not job.over:
        await rooms.jobs.wait(job.id, _LOOK_S)
        job = await rooms.jobs.get(DEFAULT_TENANT, job.id)
        advance(int(_HUNDRED * job.progress) - done)
        done = int(_HUNDRED * job.progress)
    if job.result is None:
        raise InvalidRequest(f"The training came to nothing: {(job.error or {}).get('detail', job.state)}")
    return {"seed": seed, **{name: job.result[name] for name in ("trained", "epochs", "held_out")}}


async def _arranged(rooms: Rooms, data: DataSet, known: list[Picture], plan: Plan, seed: int) -> list[Picture]:
    """Return the shuffled stream in the order of its kind, with the pictures of no class mixed in."""
    labels = torch.tensor([picture.label for picture in known])
    if plan.kind is None or plan.kind == "iid":
        order = torch.arange(len(known))
    elif plan.kind == "drift" and data.domains > 1:
        order = drift(torch.tensor([picture.domain for picture in known]), seed)
    else:
        config = _config(data, plan)
        text = await rooms.texts.class_weights([config.prompts(spec) for spec in data.classes])
        order = order_of(plan.kind, seed, n=len(known), labels=labels, text=text.cpu())
    both = [*known, *(Picture(path=path, label=None) for path in plan.unknown)]
    return [both[i] for i in mixed(order, torch.arange(len(known), len(both)), seed).tolist()]


async def _stream(rooms: Rooms, stream: Sequence[Picture], advance: Callable[[int], None], *, views: int) -> Walk:
    heard, start = _Heard(images=len(stream)), time.perf_counter()
    for part in parts(stream, call_size(rooms.settings, views)):
        results = await ask(rooms, [read(picture.path) for picture in part], views=views)
        for picture, result in zip(part, results, strict=True):
            heard.take(picture, result)
        advance(len(part))
    return heard.walk(time.perf_counter() - start)


@dataclass(kw_only=True, slots=True)
class _Heard:
    """What was heard so far of a stream of so many images."""

    images: int
    done: int = 0
    labels: list[int | None] = field(default_factory=list)
    said: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: {name: [] for name in BRANCHES})
    writes: Counter[str] = field(default_factory=Counter)
    growth: list[int] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def take(self, picture: Picture, result: Reading | Fault) -> None:
        """Note one picture's answer, or why it has none."""
        self.done += 1
        if isinstance(result, Reading):
            self.labels.append(picture.label)
            self.writes[result.learned.outcome] += 1
            for name in BRANCHES:
                first: Choice | None = getattr(result, name)
                if first is not None:
                    self.said[name].append((first.position, first.score))
        else:
            self.failed[str(picture.path)] = str(result)
        self.growth += [self.writes["filled"]] * (len(self.growth) < _TENTHS * self.done // self.images)

    def walk(self, seconds: float) -> Walk:
        """Return the whole.

        Raises:
            InvalidRequest: no picture that shows a class could be read.
        """
        known = torch.tensor([label is not None for label in self.labels], dtype=torch.bool)
        if not known.any():
            raise InvalidRequest(f"No image could be read: {next(iter(self.failed.values()))}")
        marks = {name: self._marks(name) for name in BRANCHES}
        fused = marks[ADAPTED]
        course = Course(
            branches={name: told and told[known] for name, told in marks.items()},
            labels=torch.tensor([label for label in self.labels if label is not None]),
            writes=dict(self.writes),
            seconds=seconds,
        )
        unknown = fused.confidence[~known] if fused is not None else torch.empty(0)
        return Walk(course=course, unknown=unknown, growth=self.growth, failed=self.failed)

    def _marks(self, name: str) -> Marks | None:
        if not self.said[name]:
            return None
        predicted, confidence = zip(*self.said[name], strict=True)
        return Marks(predicted=torch.tensor(predicted), confidence=torch.tensor(confidence))


async def ask(
    rooms: Rooms, images: list[bytes | ImageFault], *, views: int = 1, top_k: int = 1
) -> list[Reading | Fault]:
    """Return what the service answers to a call of the default tenant that waits as long as it takes."""
    call = ClassifyCall(
        tenant=DEFAULT_TENANT,
        images=images,
        learn=True,
        views=views,
        explain=False,
        deadline=FOREVER,
        top_k=top_k,
    )
    return await classify(rooms, call)


def read(path: Path) -> bytes | ImageFault:
    """Return a file's bytes, or why it has none."""
    try:
        return path.read_bytes()
    except OSError as error:
        return ImageUnreadable(f"{path} cannot be read: {error.strerror}.")


def call_size(settings: Settings, views: int = 1) -> int:
    """Return how many images to take at a time: no more than a call may hold, and the queue."""
    return max(1, min(_CALL, settings.max_images, min(settings.queue_images, settings.tenant_queue_images) // views))


def parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Return the items, so many at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))
