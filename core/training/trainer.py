"""Few-shot training: the five offsets of a label set, learned from its shots, Eq. (16).

The queries of a pass are features of the images of the shots, cropped anew where there are images. Some shots are held
out to tell how many passes are best. Nothing here sees the dynamic memory.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from core.classify import Sample, classify
from core.errors import UnfitShots
from core.memory.bank import Slots
from core.memory.dynamic import DynamicMemory
from core.memory.static import Shots, StaticMemory
from core.prepared_banks import Shelves
from core.readout.projection import Projection
from core.snapshot import Snapshot

from .objective import Lesson, branch_scores, lesson_of, loss, shots_of
from .recipe import ADAM_EPS, BATCH, LEAST_LEARNING_RATE, PAIR, WEIGHT_DECAY, Progress, Queries, Recipe, Trained, check

HELD_OUT_SHARE = 0.25
"""Share of a class's shots that is held out to tell when to stop; at least one."""


def course(snapshot: Snapshot, recipe: Recipe, queries: Queries | None = None) -> Generator[Progress, None, Trained]:
    """Yield after each piece of a training, and return what it came to; whoever stops asking has ended it.

    Some shots of every class that has two or more are held out and the others trained on. The pass with the lowest
    loss on those held out is chosen, the untrained state among them, and all shots are trained on up to that pass.
    Without `queries` the shots' own features are. `snapshot` is left as it is. The same arguments give the same
    offsets on the same machine, whatever other threads do.

    Raises:
        UnfitShots: as `check` says, or the offsets went out of bounds.
    """
    check([len(shots) for shots in snapshot.static.classes])
    rows = torch.arange(sum(map(len, snapshot.static.classes)))
    out = _held_out(snapshot.static, torch.Generator().manual_seed(recipe.seed))
    found = Trained(projection=None, epochs=recipe.epochs)
    if len(out):
        found = yield from _choose(snapshot, recipe, queries, rows[~torch.isin(rows, out)], out)
    run = _Run(
        lesson_of(snapshot),
        recipe,
        queries,
        rows,
        phase="all",
        epochs=found.epochs,
        span=(0.5, 1.0) if len(out) else (0.0, 1.0),
    )
    run.accuracy = found.held_out[found.epochs][1] if found.held_out else None
    for epoch in range(found.epochs):
        yield from run.once(epoch)
    offsets = run.offsets()
    if not all(getattr(offsets, field.name).isfinite().all() for field in fields(Projection)):
        raise UnfitShots("The training did not hold: an offset is no number any more. Take a smaller learning rate.")
    return replace(found, projection=offsets if found.epochs else None, losses=tuple(run.losses))


def _held_out(static: StaticMemory, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Return the rows to hold out, some of each class that has two shots; none where fewer than two classes have."""
    chosen, start = [], 0
    for shots in static.classes:
        if len(shots) >= PAIR:
            count = max(1, round(HELD_OUT_SHARE * len(shots)))
            chosen.append(start + torch.randperm(len(shots), generator=generator)[:count])
        start += len(shots)
    return torch.cat(chosen).sort().values if len(chosen) >= PAIR else torch.empty(0, dtype=torch.long)


def _choose(
    snapshot: Snapshot,
    recipe: Recipe,
    queries: Queries | None,
    rest: Int[Tensor, " m"],
    out: Int[Tensor, " n"],
) -> Generator[Progress, None, Trained]:
    """Train on the rest, and return after how many passes those held out had the lowest loss, and what it was worth."""
    run = _Run(
        lesson_of(snapshot, rest), recipe, queries, rest, phase="held-out", epochs=recipe.epochs, span=(0.0, 0.5)
    )
    keys, labels = shots_of(snapshot)
    exam = keys[out.to(keys.device)], labels[out].to(keys.device)
    untrained = chosen = run.offsets()
    found, best = [(yield from _examined(run, untrained, *exam))], 0
    for epoch in range(recipe.epochs):
        run.accuracy = found[-1][1]
        yield from run.once(epoch)
        found.append((yield from _examined(run, run.offsets(), *exam)))
        if found[-1][0] < found[best][0]:
            best, chosen = epoch + 1, run.offsets()
    frozen = _only(snapshot, rest)
    return Trained(
        projection=None,
        epochs=best,
        held_out=tuple(found),
        before=(yield from _accuracies(run, frozen, *exam)),
        after=(yield from _accuracies(run, replace(frozen, projection=chosen), *exam)),
    )


class _Run:
    """Offsets on their way, changed step by step. `rows` are those of the lesson among what `queries` gives."""

    def __init__(
        self,
        lesson: Lesson,
        recipe: Recipe,
        queries: Queries | None,
        rows: Int[Tensor, " m"],
        *,
        phase: str,
        epochs: int,
        span: tuple[float, float],
    ) -> None:
        self.lesson, self._queries, self._rows = lesson, queries, rows
        self._epochs, self._span = epochs, span
        self.standing = Progress(phase=phase, epoch=0, epochs=epochs, loss=None, accuracy=None, done=span[0])
        self._order = torch.Generator().manual_seed(recipe.seed)
        self._steps = -(-len(rows) // BATCH)
        self._leaves_out = int(lesson.counts.min()) > 1
        self._planned, self._rate = recipe.epochs * self._steps, recipe.rate(lesson.tau)
        self._taken = 0
        self.losses: list[float] = []
        self.accuracy: float | None = None
        with torch.inference_mode(mode=False):
            zeros = Projection.zeros(*lesson.text.shape)
            self._parameters = {
                field.name: getattr(zeros, field.name).to(lesson.text).requires_grad_() for field in fields(Projection)
            }
            self._adam = torch.optim.AdamW(self._parameters.values(), eps=ADAM_EPS, weight_decay=WEIGHT_DECAY)

    def offsets(self) -> Projection:
        """Return a copy of the offsets as they are."""
        return Projection(**{name: value.detach().clone() for name, value in self._parameters.items()})

    def once(self, epoch: int) -> Iterator[Progress]:
        """Pass once over the shots, in random order, and tell of each step."""
        x = self.lesson.keys if self._queries is None else self._queries(epoch)[self._rows].to(self.lesson.keys)
        order, total = torch.randperm(len(x), generator=self._order).to(x.device), 0.0
        first, end = self._span
        for step, batch in enumerate(order.split(BATCH), 1):
            last = self._step(x[batch], batch)
            total += last * len(batch)
            done = first + (end - first) * (epoch + step / self._steps) / self._epochs
            self.standing = replace(self.standing, epoch=epoch + 1, loss=last, accuracy=self.accuracy, done=done)
            yield self.standing
        self.losses.append(total / len(x))

    def _step(self, x: Float[Tensor, "n d"], batch: Int[Tensor, " n"]) -> float:
        """Take one step of AdamW, and return the loss before it."""
        with torch.inference_mode(mode=False), torch.enable_grad():
            self._adam.param_groups[0]["lr"] = _scheduled(self._rate, self._taken / self._planned)
            self._adam.zero_grad()
            lesson, own = self.lesson, Projection(**self._parameters)
            ranks = lesson.ranks[batch] if self._leaves_out else None
            value = loss(lesson, own, x.clone(), lesson.labels[batch], ranks)
            value.backward()
            self._adam.step()
        self._taken += 1
        return value.item()


def _scheduled(rate: float, share: float) -> float:
    """Return the learning rate after a share of the steps, on a half wave of the cosine; never above `rate`."""
    least = min(rate, LEAST_LEARNING_RATE)
    return least + (rate - least) * (1 + math.cos(math.pi * share)) / 2


def _only(snapshot: Snapshot, rows: Int[Tensor, " m"]) -> Snapshot:
    """Return a label set with some of its shots, an empty dynamic memory, no offsets, and the paper's method."""
    keys, labels = shots_of(snapshot)
    own = [rows[labels[rows] == c] for c in range(len(snapshot.text))]
    shots = tuple(Shots(keys=keys[few.to(keys.device)], ids=tuple(few.tolist())) for few in own)
    nothing = tuple(Slots.empty(keys.shape[-1], device=keys.device) for _ in own)
    return replace(
        snapshot,
        static=StaticMemory(classes=shots),
        dynamic=DynamicMemory(classes=nothing, slots=snapshot.dynamic.slots),
        projection=None,
        adaptation=None,
    )


def _examined(
    run: _Run, projection: Projection, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"]
) -> Generator[Progress, None, tuple[float, float]]:
    """Return the loss of held-out shots, and the accuracy in percent of text and static branch together."""
    parts: list[tuple[Tensor, Tensor]] = []
    for part in x.split(BATCH):
        if parts:
            yield run.standing
        with torch.no_grad():
            parts.append(branch_scores(run.lesson, projection, part))
    text, static = (torch.cat(own) for own in zip(*parts, strict=True))
    right = (text.softmax(-1) + static.softmax(-1)).argmax(-1) == labels
    return (cross_entropy(static, labels) + cross_entropy(text, labels)).item(), 100 * right.double().mean().item()


def _accuracies(
    run: _Run, snapshot: Snapshot, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"]
) -> Generator[Progress, None, dict[str, float]]:
    """Return the accuracy in percent of each branch on images that the memory does not learn."""
    shelves, right = Shelves(snapshot), dict.fromkeys(("text", "static", "fused"), 0)
    for part, own in zip(x.split(BATCH), labels.split(BATCH), strict=True):
        yield run.standing
        answers = classify(shelves, [Sample(views=row[None], id=at, learn=False) for at, row in enumerate(part)])
        for name in right:
            right[name] += int((getattr(answers, name).argmax(-1) == own).sum())
    return {name: 100 * count / len(x) for name, count in right.items()}
