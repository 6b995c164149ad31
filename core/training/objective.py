"""What a label set's offsets are trained on, and the loss, Eq. (16).

The loss is the cross-entropy of the static scores, Eq. (7) to (11) and (13), plus that of the text scores, Eq. (14).
The static memory holds the plain features of the shots. A query that is one of them, or a crop of the same image, would
find itself there, and the offsets learn to trust what no later image has: so its own shot is left out, and with it one
of every other class, as cosines between images are far above those between image and text. Only where a class has a
single shot none is left out: the static branch would be that of the text, and nothing learned of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from core.memory.bank import Bank, pack
from core.readout.projection import Projection, project_query, project_text
from core.readout.scores import barrier, prepare, scores
from core.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What is trained on: class weights, the bank that the static branch reads, and the shots in it, row by row.

    `ranks` are the places of the shots among those of their class, and `counts` how many each class has.
    """

    text: Float[Tensor, "c d"]
    bank: Bank
    keys: Float[Tensor, "m d"]
    labels: Int[Tensor, " m"]
    ranks: Int[Tensor, " m"]
    counts: Int[Tensor, " c"]
    tau: float
    beta: float


def lesson_of(snapshot: Snapshot, rows: Int[Tensor, " n"] | None = None) -> Lesson:
    """Return the lesson of all shots of a label set, or of those in some rows, in float32."""
    with torch.inference_mode(mode=False):  # what is made in that mode cannot be learned from
        text = snapshot.text.clone()
        keys, labels = shots_of(snapshot)
        if rows is not None:
            keys, labels = keys[rows.to(keys.device)], labels[rows]
        counts = torch.bincount(labels, minlength=len(text))
        own = keys.split(counts.tolist())
        return Lesson(
            text=text,
            bank=pack([torch.cat((text[c : c + 1], shots)) for c, shots in enumerate(own)]),
            keys=keys,
            labels=labels.to(text.device),
            ranks=torch.cat([torch.arange(len(shots), device=text.device) for shots in own]),
            counts=counts.to(text.device),
            tau=snapshot.tau,
            beta=snapshot.beta,
        )


def loss(
    lesson: Lesson,
    projection: Projection,
    x: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    ranks: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Return the loss of Eq. (16): the cross-entropies of static and text scores, each a mean over the queries.

    With `ranks` the static branch reads for each query all shots but the one of that place in each class.
    """
    text, static = branch_scores(lesson, projection, x, ranks)
    return cross_entropy(static, labels) + cross_entropy(text, labels)


def branch_scores(
    lesson: Lesson, projection: Projection, x: Float[Tensor, "n d"], ranks: Int[Tensor, " n"] | None = None
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """Return the text scores, Eq. (14), and the static scores, Eq. (7) to (11) and (13), of queries; see `loss`."""
    mask = lesson.bank.occupied[:, None] if ranks is None else _without(lesson, ranks).transpose(0, 1)
    prepared, query = prepare(lesson.bank, projection), project_query(x, projection)
    static = scores(prepared, barrier(mask)[:, None], x, query, beta=lesson.beta, tau=lesson.tau)[0]
    return lesson.tau * x @ project_text(lesson.text, projection).T, static


def shots_of(snapshot: Snapshot) -> tuple[Float[Tensor, "m d"], Int[Tensor, " m"]]:
    """Return all shots in float32, class after class, and their labels (on the CPU)."""
    sizes = torch.tensor([len(shots) for shots in snapshot.static.classes])
    keys = torch.cat([shots.keys.to(snapshot.text) for shots in snapshot.static.classes])
    return keys, torch.arange(len(sizes)).repeat_interleave(sizes)


def _without(lesson: Lesson, ranks: Int[Tensor, " n"]) -> Bool[Tensor, "n c s"]:
    """Return which slots each query may read: all but one shot of every class, counted around where a class has few."""
    own = 1 + ranks[:, None] % lesson.counts.clamp_min(1)
    slots = torch.arange(lesson.bank.occupied.shape[1], device=own.device)
    return lesson.bank.occupied & (slots != own[:, :, None])
