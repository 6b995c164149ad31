"""Scoring of a group of images against one hot memory, on the worker thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.adaptive.adaptation import Adapted
from core.classify import Answers, Sample, classify
from core.memory.bank import Slots
from core.memory.dynamic import DynamicMemory, Outcome, SlotWrite
from core.memory.static import Shots
from core.numerics import affinity
from core.readout.projection import project_query, project_slots
from service.memory.hot_memory import HotMemory

from .results import Choice, Explanation, Question, Trace

STRONGEST = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What the memory said to one image."""

    probabilities: Tensor
    top: tuple[Choice, ...]
    firsts: Mapping[str, Choice]
    explanation: Explanation | None


def score_group(hot: HotMemory, questions: Sequence[Question], room: int) -> tuple[Answers, list[Scored]]:
    """Classify in the worker, and bring what callers ask for to the CPU, all of a group's at once."""
    learn = hot.config.learn
    samples = [
        Sample(views=q.views, id=q.digest, learn=q.learn and learn, count=count)
        for q, count in zip(questions, _to_count(hot, questions), strict=True)
    ]
    answers = classify(hot.shelves, samples, _may_store(hot, room))
    said = [
        Scored(
            probabilities=p,
            top=top[: question.top_k],
            firsts=firsts,
            explanation=_explain(hot, question.views[:1], seen) if question.explain else None,
        )
        for p, (top, firsts), seen, question in zip(
            answers.fused.cpu(),
            _choices(hot.names, answers, max(question.top_k for question in questions)),
            answers.seen,
            questions,
            strict=True,
        )
    ]
    return answers, said


def _choices(
    names: Sequence[str], answers: Answers, most: int
) -> Iterator[tuple[tuple[Choice, ...], dict[str, Choice]]]:
    """Yield each image's likeliest choices, so many at most, and the first choice of each branch that there is."""
    every = {
        "text": answers.text,
        "dynamic": answers.dynamic,
        "static": answers.static,
        "statistics": answers.statistics,
    }
    held = {branch: p for branch, p in every.items() if p is not None}
    likeliest, firsts = answers.fused.topk(min(len(names), most)), torch.stack(list(held.values()), 1).max(-1)
    scores = torch.cat((firsts.values, likeliest.values), 1).tolist()
    places = torch.cat((firsts.indices, likeliest.indices), 1).tolist()
    for row in zip(scores, places, strict=True):
        choices = [Choice(names[place], place, score) for score, place in zip(*row, strict=True)]
        yield tuple(choices[len(held) :]), dict(zip(held, choices, strict=False))


def _to_count(hot: HotMemory, questions: Sequence[Question]) -> list[bool]:
    """Return of each image whether class statistics count it: not unasked, again, purged, or under other labels."""
    if hot.tally is None or hot.due or not hot.config.learn:
        return [False] * len(questions)
    purged = {id_ for _, id_ in hot.barred}
    may = [question.learn and question.digest not in purged for question in questions]
    new = iter(hot.tally.is_new([question.digest for question, own in zip(questions, may, strict=True) if own]))
    return [own and next(new) for own in may]


def count_group(hot: HotMemory, questions: Sequence[Question], adapted: Adapted) -> None:
    """Take in what was counted of a group that was answered; in the worker, where nobody reads meanwhile."""
    if hot.tally is None or not adapted.counted:
        return
    digests = [own.digest for own, count in zip(questions, _to_count(hot, questions), strict=True) if count]
    for some in adapted.counted:
        hot.tally.add(some)
    hot.tally.remember(digests)
    hot.shelves.advance(replace(hot.snapshot, adaptation=adapted.adaptation))


def _may_store(hot: HotMemory, room: int) -> Callable[[SlotWrite], bool]:
    """Return who may enter: not what was purged, and no more fills than there is room for.

    Nobody, for now, where the slots were scored under another label set: entropies of two cannot be compared.
    """

    def may(write: SlotWrite) -> bool:
        nonlocal room
        fills = write.outcome is Outcome.FILLED
        if hot.due or is_barred(hot, write) or (fills and room <= 0):
            return False
        room -= fills
        return True

    return may


def is_barred(hot: HotMemory, write: SlotWrite) -> bool:
    """Return whether a slot write is of an image that was purged."""
    return (hot.config.classes[write.candidate.label].id, str(write.candidate.id)) in hot.barred


def _explain(hot: HotMemory, x: Tensor, memory: DynamicMemory) -> Explanation:
    """Return the slots and shots of highest affinity, Eq. (9), among those that the memory holds."""
    snapshot = hot.snapshot
    names = hot.names
    query = project_query(x, snapshot.projection)[0]

    def strongest(banks: Sequence[Slots | Shots]) -> list[tuple[int, int, float]]:
        held = [index for index, bank in enumerate(banks) if len(bank)]
        found = []
        for index in held:
            keys = banks[index].keys.to(query)[None]
            offset = None if snapshot.projection is None else snapshot.projection.key[index][None]
            close = affinity(project_slots(keys, offset)[0] @ query, snapshot.beta)
            values, places = close.topk(min(STRONGEST, len(close)))
            found += [(index, place, value) for value, place in zip(values.tolist(), places.tolist(), strict=True)]
        return sorted(found, key=lambda one: -one[2])[:STRONGEST]

    slots, shots = memory.classes, snapshot.static.classes
    return Explanation(
        dynamic=tuple(
            Trace(label=names[c], id=str(slots[c].ids[i]), affinity=value, entropy=slots[c].entropies[i])
            for c, i, value in strongest(slots)
        ),
        static=tuple(
            Trace(label=names[c], id=str(shots[c].ids[i]), affinity=value) for c, i, value in strongest(shots)
        ),
    )
