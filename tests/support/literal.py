"""The method written out, one loop per sum: slow, plain, and what the tests hold the fast form against.

Every function states its equation. Vectors are NumPy arrays of one floating type, `float64` or `float32`, that of the
features given; nothing here imports the package under test. Classes, slots, views and prompts are looped over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.floating]
Matrix = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Offsets:
    """b_q, b_k, b_v, b_o, b_t, one row a class."""

    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    text: Matrix


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One filled dynamic slot."""

    key: Vector
    entropy: float
    id: int | str


@dataclass(frozen=True, kw_only=True)
class Method:
    """What does not change along a stream: class weights, shots by class, offsets and the numbers."""

    text: Matrix
    shots: Sequence[Sequence[Vector]]
    offsets: Offsets
    slots: int
    tau: float = 100.0
    beta: float = 5.5
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    relative: bool = False

    @property
    def classes(self) -> range:
        return range(len(self.text))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one image got: three branches, their fusion, its label, its entropy, and what became of it."""

    text: Vector
    dynamic: Vector
    static: Vector | None
    fused: Vector
    label: int
    entropy: float
    outcome: str
    slot: int


@dataclass
class Memory:
    """The dynamic memory, a list of entries a class, changed in place."""

    banks: list[list[Entry]] = field(default_factory=list)

    def copy(self) -> Memory:
        return Memory(banks=[list(bank) for bank in self.banks])


def no_offsets(classes: int, dim: int, dtype: type[np.floating] = np.float64) -> Offsets:
    """Return five offsets of zero."""
    return Offsets(**{name: np.zeros((classes, dim), dtype) for name in ("query", "key", "value", "output", "text")})


def dot(a: Vector, b: Vector) -> np.floating:
    """Return the inner product."""
    return (a * b).sum()


def u(v: Vector) -> Vector:
    """Return v / |v|."""
    return v / np.sqrt(dot(v, v))


def softmax(scores: Vector) -> Vector:
    """Return exp(s_c) over its sum, after taking the largest off, which cancels."""
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def entropy(p: Vector, eps: float) -> np.floating:
    """Return -sum_c p_c ln(p_c + eps)."""
    total = p.dtype.type(0.0)
    for value in p:
        total -= value * np.log(value + p.dtype.type(eps))
    return total


def eq_1(prompts: Sequence[Sequence[Vector]]) -> Matrix:
    """t_c = u(mean over the prompts p of class c of u(E_text(p)))."""
    rows = []
    for own in prompts:
        total = np.zeros_like(own[0])
        for feature in own:
            total = total + u(feature)
        rows.append(u(total / len(own)))
    return np.stack(rows)


def eq_14(method: Method, x: Vector) -> Vector:
    """P_t = softmax(tau u(t_c + b_t[c]) . x)."""
    scores = [method.tau * dot(u(method.text[c] + method.offsets.text[c]), x) for c in method.classes]
    return softmax(np.array(scores, x.dtype))


def eq_2(method: Method, views: Matrix) -> tuple[list[Vector], list[float]]:
    """p_v = the head of (14) for each view; H_v = -sum p ln(p + 1e-6)."""
    probabilities = [eq_14(method, view) for view in views]
    return probabilities, [float(entropy(p, 1e-6)) for p in probabilities]


def eq_3(probabilities: Sequence[Vector], entropies: Sequence[float]) -> Vector:
    """p_bar = mean of the probabilities of the k = max(1, floor(0.1 V)) views of lowest entropy, early ones first."""
    keep = max(1, len(probabilities) // 10)
    order = sorted(range(len(probabilities)), key=lambda v: (entropies[v], v))
    total = np.zeros_like(probabilities[0])
    for v in order[:keep]:
        total = total + probabilities[v]
    return total / keep


def eq_4(p_bar: Vector) -> tuple[int, float]:
    """Label y = argmax p_bar; entropy h = -sum p_bar ln(p_bar + 1e-8)."""
    return int(p_bar.argmax()), float(entropy(p_bar, 1e-8))


def eq_5(bank: list[Entry], new: Entry, slots: int) -> tuple[str, int]:
    """Store in a free slot; when full, the largest of the slots and the new sample by (entropy, id) leaves."""
    if len(bank) < slots:
        bank.append(new)
        return "filled", len(bank) - 1
    if slots == 0:
        return "rejected", -1
    worst = 0
    for m in range(1, slots):
        if (bank[m].entropy, bank[m].id) > (bank[worst].entropy, bank[worst].id):
            worst = m
    if (new.entropy, new.id) > (bank[worst].entropy, bank[worst].id):
        return "rejected", -1
    bank[worst] = new
    return "replaced", worst


def eq_7(method: Method, x: Vector) -> Vector:
    """Query q = u(x + mean_c b_q[c])."""
    total = np.zeros_like(x)
    for c in method.classes:
        total = total + method.offsets.query[c]
    return u(x + total / len(method.text))


def eq_8_to_10(method: Method, c: int, slots: Sequence[Vector], q: Vector) -> Vector:
    """f_c = u(u(sum_m w_m v_m) + b_o[c]) with w_m = exp(-beta (1 - k_m . q)), over the filled slots m of class c."""
    cosines, values = [], []
    for m in slots:
        cosines.append(dot(u(m + method.offsets.key[c]), q))
        values.append(u(m + method.offsets.value[c]))
    # A factor common to a class cancels in (10). Taking out the largest is exact, and the only way at a large beta.
    top = max(cosines) if method.relative else 1.0
    total = np.zeros_like(q)
    for cosine, value in zip(cosines, values, strict=True):
        total = total + np.exp(-method.beta * (top - cosine)) * value
    return u(u(total) + method.offsets.output[c])


def eq_7_to_11(method: Method, banks: Sequence[Sequence[Vector]], x: Vector) -> Vector:
    """score_c = tau f_c . x with the unprojected x, for every class c with the slots banks[c]."""
    q = eq_7(method, x)
    return np.array([method.tau * dot(eq_8_to_10(method, c, banks[c], q), x) for c in method.classes], x.dtype)


def eq_12(method: Method, memory: Memory) -> list[list[Vector]]:
    """The dynamic branch reads the dynamic slots of c, its text feature, and its plain shots."""
    return [[*(entry.key for entry in memory.banks[c]), method.text[c], *method.shots[c]] for c in method.classes]


def eq_13(method: Method) -> list[list[Vector]] | None:
    """The static branch reads t_c and all shots of c; absent without shots."""
    if not any(len(own) for own in method.shots):
        return None
    return [[method.text[c], *method.shots[c]] for c in method.classes]


def eq_15(method: Method, text: Vector, dynamic: Vector, static: Vector | None) -> Vector:
    """P = (a1 P_t + a2 P_d + a3 P_s) / (a1 + a2 + a3), a3 = 0 without shots."""
    a1, a2, a3 = method.weights
    if static is None:
        return (a1 * text + a2 * dynamic) / (a1 + a2)
    return (a1 * text + a2 * dynamic + a3 * static) / (a1 + a2 + a3)


def eq_16(
    method: Method, queries: Sequence[Vector], labels: Sequence[int], left_out: Sequence[int] | None = None
) -> np.floating:
    """Cross-entropy of the static scores plus that of the text scores, each a mean over the queries.

    With `left_out` the static branch reads for query i all shots of c but number left_out[i], counted around.
    """
    total = queries[0].dtype.type(0.0)
    for i, (x, y) in enumerate(zip(queries, labels, strict=True)):
        shelf = eq_13(method)
        if left_out is not None:
            shelf = [[bank[0], *without(bank[1:], left_out[i])] for bank in shelf]
        total -= np.log(softmax(eq_7_to_11(method, shelf, x))[y]) + np.log(eq_14(method, x)[y])
    return total / len(queries)


def without(shots: Sequence[Vector], number: int) -> list[Vector]:
    """Return the shots but one, counted around."""
    return [shot for k, shot in enumerate(shots) if k != number % len(shots)]


def step(method: Method, memory: Memory, views: Matrix, number: int | str, *, learn: bool = True) -> Answer:
    """Take one image: (2) to (4), the write (5) before the read (6), then (7) to (15)."""
    x = views[0]
    probabilities, entropies = eq_2(method, views)
    label, nats = eq_4(eq_3(probabilities, entropies))
    seen = memory if learn else memory.copy()
    outcome, slot = eq_5(seen.banks[label], Entry(key=x, entropy=nats, id=number), method.slots)
    dynamic = softmax(eq_7_to_11(method, eq_12(method, seen), x))
    shelf = eq_13(method)
    static = None if shelf is None else softmax(eq_7_to_11(method, shelf, x))
    return Answer(
        text=probabilities[0],
        dynamic=dynamic,
        static=static,
        fused=eq_15(method, probabilities[0], dynamic, static),
        label=label,
        entropy=nats,
        outcome=outcome,
        slot=slot,
    )


def stream(
    method: Method,
    images: Sequence[Matrix],
    *,
    learn: Sequence[bool] | None = None,
) -> tuple[list[Answer], Memory]:
    """Take the images in order, numbered from 0, from an empty memory."""
    memory = Memory(banks=[[] for _ in method.classes])
    flags = [True] * len(images) if learn is None else learn
    answers = [
        step(method, memory, views, number, learn=flag)
        for number, (views, flag) in enumerate(zip(images, flags, strict=True))
    ]
    return answers, memory


def certain(method: Method, images: Sequence[Matrix], margin: float = 3e-5) -> bool:
    """Return whether no decision on a stream hangs on less than `margin`: labels, orders of entropy, chosen views."""
    nats: dict[int, list[float]] = {}
    for views in images:
        probabilities, entropies = eq_2(method, views)
        keep, order = max(1, len(views) // 10), sorted(entropies)
        p_bar = eq_3(probabilities, entropies)
        label, own = eq_4(p_bar)
        others = [p for c, p in enumerate(p_bar) if c != label]
        if keep < len(order) and order[keep] - order[keep - 1] < margin:
            return False
        if others and p_bar[label] - max(others) < margin:
            return False
        if any(math.isclose(own, other, rel_tol=0, abs_tol=margin) for other in nats.setdefault(label, [])):
            return False
        nats[label].append(own)
    return True
