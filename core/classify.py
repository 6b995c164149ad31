"""One step for the images of one tenant: features in, probabilities and slot writes out.

Images of a batch are taken in order, each as if it had come alone: the batch is scored against the memory before
it, and the few (image, class) pairs whose slots an earlier image wrote, or the image itself, are read again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from core.adaptive.adaptation import Adaptation, Adapted, adapt
from core.memory.bank import SlotId, Slots
from core.memory.dynamic import Candidate, DynamicMemory, SlotWrite, apply, propose
from core.readout.fusion import fuse
from core.readout.projection import project_text

from .numerics import VIEW_EPS, entropy
from .prepared_banks import Shelves
from .snapshot import Snapshot

CONFIDENT_SHARE = 0.1
"""Share of the views, the surest, that give the pseudo-label, Eq. (3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image: unit-norm features of its views, view 1 first, its id, and whether the memories may learn it.

    `count` says whether class statistics, where there are any, count an image that they may learn: not one that they
    have counted before.
    """

    views: Float[Tensor, "v d"]
    id: SlotId
    learn: bool = True
    count: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Probabilities of each branch and of their fusion, one row an image, and what each image did to the memory.

    `writes[i]` is the decision on image i, and `learned[i]` whether the memory took it; where it did not, the answer
    was read through a virtual insert. `seen[i]` is the dynamic memory after image i. `adapted` is what the method
    `auto` makes of the images.
    """

    text: Float[Tensor, "n c"]
    dynamic: Float[Tensor, "n c"]
    static: Float[Tensor, "n c"] | None
    fused: Float[Tensor, "n c"]
    writes: tuple[SlotWrite, ...]
    learned: tuple[bool, ...]
    seen: tuple[DynamicMemory, ...]
    memory: DynamicMemory
    adapted: Adapted | None = None

    @property
    def statistics(self) -> Float[Tensor, "n c"] | None:
        """Probabilities of the class statistics alone; None with the method `dmn`."""
        return None if self.adapted is None else self.adapted.statistics

    @property
    def adaptation(self) -> Adaptation | None:
        """The adaptation after the images; None with the method `dmn`."""
        return None if self.adapted is None else self.adapted.adaptation


def classify(
    shelves: Shelves, samples: Sequence[Sample], may_store: Callable[[SlotWrite], bool] = lambda _: True
) -> Answers:
    """Return the answers to images in order, and the memory after those that learn. `shelves` stays as it is.

    `may_store` is asked once, in order, for each write that a learning image would make; one that it refuses is not
    made, and the image is answered as if it were not to learn.

    The write comes before the read, Eq. (6): an image that is stored sees itself. One that must not learn sees the
    memory that its write would have given (a virtual insert).
    """
    snapshot = shelves.snapshot
    views = torch.cat([sample.views for sample in samples])
    counts = [len(sample.views) for sample in samples]
    text, frozen = label_scores(snapshot, views)
    x, plain = _firsts(views, counts), _firsts(text, counts).to(views.dtype)
    first = plain if frozen is text else _firsts(frozen, counts).to(views.dtype)
    candidates = _candidates(samples, x, _sure(frozen.softmax(-1), counts))
    writes, learned, seen, reads = _decide(snapshot.dynamic, samples, candidates, may_store)
    dynamic, static = shelves.scores(x)
    _patch(shelves, dynamic, x, reads)
    p, dynamic = plain.exp(), dynamic.softmax(-1)
    static = None if static is None else static.softmax(-1)
    adapted = None
    if snapshot.adaptation is not None:
        adapted = adapt(snapshot.adaptation, x, plain, first, [own.learn and own.count for own in samples])
    return Answers(
        text=p,
        dynamic=dynamic,
        static=static,
        fused=fuse(p, dynamic, static, snapshot.weights) if adapted is None else adapted.fused,
        writes=tuple(writes),
        learned=tuple(learned),
        seen=tuple(seen),
        memory=seen[-1],
        adapted=adapted,
    )


def confident_mean(views: Float[Tensor, "v c"]) -> Float[Tensor, " c"]:
    """Return the mean probabilities of the k = max(1, floor(0.1 v)) views of lowest entropy, Eq. (2) and (3).

    Of views with equal entropies the earlier ones are kept.
    """
    keep = max(1, int(CONFIDENT_SHARE * len(views)))
    surest = entropy(views, VIEW_EPS).argsort(stable=True)[:keep]
    return views[surest].mean(0)


def text_scores(features: Float[Tensor, "n d"], head: Float[Tensor, "c d"], tau: float) -> Float64[Tensor, "n c"]:
    """Return log softmax(tau u(t_c + b_t[c]) . x), Eq. (2) and (14), for the projected text `head`.

    In float64: in float32 the probability of a sure image rounds to 1, and entropies that order the memory would tie,
    or differ by chance with the size of the batch.
    """
    return (tau * features @ head.T).double().log_softmax(-1)


def label_scores(
    snapshot: Snapshot, features: Float[Tensor, "n d"]
) -> tuple[Float64[Tensor, "n c"], Float64[Tensor, "n c"]]:
    """Return the text head's log probabilities, and the scores whose softmax labels images.

    These are the same with `dmn`; with `auto` they are the frozen branches', Eq. (17).
    """
    text = text_scores(features, project_text(snapshot.text, snapshot.projection), snapshot.tau)
    return text, text if snapshot.adaptation is None else snapshot.adaptation.frozen.scores(text, features)


def _sure(p: Float[Tensor, "v c"], counts: Sequence[int]) -> Float[Tensor, "n c"]:
    """Return the mean probabilities of each image's surest views, for so many views an image."""
    return p if len(p) == len(counts) else torch.stack([confident_mean(own) for own in p.split(list(counts))])


def _firsts(rows: Float[Tensor, "v k"], counts: Sequence[int]) -> Float[Tensor, "n k"]:
    """Return the row of each image's first view, for so many views an image."""
    return rows if len(rows) == len(counts) else torch.stack([own[0] for own in rows.split(list(counts))])


def _candidates(samples: Sequence[Sample], x: Float[Tensor, "n d"], sure: Float[Tensor, "n c"]) -> list[Candidate]:
    """Return the images as the memory meets them, Eq. (4): label and entropy of the sure views, feature of view 1."""
    labels, entropies = sure.argmax(-1).tolist(), entropy(sure).tolist()
    return [
        Candidate(label=label, key=key, entropy=nats, id=sample.id)
        for sample, key, label, nats in zip(samples, x.unbind(), labels, entropies, strict=True)
    ]


def _decide(
    memory: DynamicMemory,
    samples: Sequence[Sample],
    candidates: Sequence[Candidate],
    may_store: Callable[[SlotWrite], bool],
) -> tuple[list[SlotWrite], list[bool], list[DynamicMemory], dict[tuple[int, int], tuple[Slots, list[int]]]]:
    """Return each image's write, whether it was made, the memory after it, and who sees which class how.

    The last, the images that see a class otherwise than on the shelves, is keyed by class and identity of its slots,
    so that images that see the same slots are read together.
    """
    before = memory.classes
    writes, learned, seen = [], [], []
    reads: dict[tuple[int, int], tuple[Slots, list[int]]] = {}
    touched: set[int] = set()
    for i, (sample, candidate) in enumerate(zip(samples, candidates, strict=True)):
        write = propose(memory, candidate)
        after = apply(memory, write)
        for label in touched | {candidate.label}:
            slots = after.classes[label]
            if slots is not before[label]:
                reads.setdefault((label, id(slots)), (slots, []))[1].append(i)
        made = sample.learn and write.slot is not None and may_store(write)
        if made:
            memory = after
            touched.add(candidate.label)
        writes.append(write)
        learned.append(made)
        seen.append(memory)
    return writes, learned, seen, reads


def _patch(
    shelves: Shelves,
    dynamic: Float[Tensor, "n c"],
    x: Float[Tensor, "n d"],
    reads: dict[tuple[int, int], tuple[Slots, list[int]]],
) -> None:
    """Overwrite the scores of the images that see other slots than those on the shelves."""
    if not reads:
        return
    patched = shelves.patched([(label, slots) for (label, _), (slots, _) in reads.items()], x)
    at = [(i, place, label) for place, ((label, _), (_, images)) in enumerate(reads.items()) for i in images]
    images, places, labels = torch.tensor(at, device=x.device).T
    dynamic[images, labels] = patched[images, places]
