"""The method `auto` written out, one loop per sum, as `literal` writes out the rest: float64, slow and plain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.support.literal import Matrix, Vector, dot, softmax

STEPS = [-2.0 + 0.25 * k for k in range(17)]


@dataclass
class Sums:
    """S, s, G, M, n of Eq. (18), and agreement; changed in place."""

    sums: Matrix
    counts: Vector
    total: Vector
    second: Matrix
    images: int = 0
    agreed: list[float] = field(default_factory=lambda: [0.0] * len(STEPS))
    sure: float = 0.0

    @staticmethod
    def none(classes: int, dim: int) -> Sums:
        return Sums(np.zeros((classes, dim)), np.zeros(classes), np.zeros(dim), np.zeros((dim, dim)))

    def add(self, x: Vector, r: Vector) -> None:
        """Count one image, Eq. (18), but for its agreement."""
        for c, share in enumerate(r):
            self.sums[c] += share * x
            self.counts[c] += share
        self.total += x
        self.second += np.outer(x, x)
        self.images += 1


def shots_of(shots: Sequence[Sequence[Vector]], dim: int) -> Sums:
    """Count each shot as an image whose class is known."""
    sums = Sums.none(len(shots), dim)
    for c, own in enumerate(shots):
        for x in own:
            sums.add(x, np.eye(len(shots))[c])
    return sums


def precision(scatter: Matrix, count: float, ridge: float) -> Matrix:
    """P = [(1 - rho) scatter / t + (rho + 1e-4) I]^-1; the identity where there is no spread."""
    dim = len(scatter)
    trace = sum(scatter[d, d] for d in range(dim))
    if count <= 0 or trace <= 1e-3:
        return np.eye(dim)
    rho = ridge * dim / (count + ridge * dim)
    return np.linalg.inv((1 - rho) * scatter / (trace / dim) + (rho + 1e-4) * np.eye(dim))


def cosine(a: Vector, p: Matrix, v: Vector) -> float:
    """cos_P(v, a) = a' P v / sqrt(a' P a  v' P v); 0 where one of them has no length."""
    lengths = (a @ p @ a, v @ p @ v)
    return 0.0 if min(lengths) < 1e-9 else float(a @ p @ v / math.sqrt(lengths[0] * lengths[1]))


def shown(shots: Sequence[Sequence[Vector]], x: Vector) -> Vector:
    """z0_c = cos_P(x - g, m_c - g); 0 for a class without shots."""
    means = {c: sum(own[1:], own[0]) / len(own) for c, own in enumerate(shots) if len(own)}
    g = sum(means.values()) / len(means)
    scatter, differences = np.zeros((len(g), len(g))), 0
    for c, mean in means.items():
        for shot in shots[c]:
            scatter += np.outer(shot - mean, shot - mean)
        differences += len(shots[c]) - 1
    p = precision(scatter / max(differences, 1), differences if differences >= len(means) else 0, 2.0)
    return np.array([cosine(means[c] - g, p, x - g) if c in means else 0.0 for c in range(len(shots))])


def eq_17(text: Vector, gamma: float, z0: Vector | None) -> Vector:
    """F = log p_text + gamma z0, for the text head's log probabilities."""
    return text if z0 is None else text + gamma * z0


def trusted(text: Matrix, shots: Sequence[Sequence[Vector]], tau: float) -> tuple[float, float, int]:
    """Return gamma, the sharpness, and how many shots these were measured on; for a few shots."""
    every = [(c, x) for c, own in enumerate(shots) for x in own]
    right = sum(int(np.argmax(text @ x) == c) for c, x in every)
    expected = 2.0 * (1.0 - (right + 0.5) / (len(every) + 1.0))
    several = [c for c, own in enumerate(shots) if len(own) > 1]
    if len(several) < 2:
        spread = [spread_of_others(tau * text @ x, c) for c, x in every]
        own = [spread_of_others(shown(shots, x), c) for c, x in every]
        return expected * unit(float(np.mean(spread)), float(np.mean(own))), 1.0, 0
    rows = []
    for rank in range(min(8, max(len(shots[c]) for c in several))):
        out = [c for c in several if len(shots[c]) > rank]
        rest = [[x for k, x in enumerate(own) if c not in out or k != rank] for c, own in enumerate(shots)]
        rows += [(c, tau * text @ shots[c][rank], shown(rest, shots[c][rank])) for c in out]
    one = unit(float(np.mean([t.std() for _, t, _ in rows])), float(np.mean([z.std() for _, _, z in rows])))
    best, found = math.inf, (0.0, 0.0)
    for weight in (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0):
        for sharpness in (0.35, 0.5, 0.7, 1.0, 1.4):
            loss = math.log((weight + 0.1) / (expected + 0.1)) ** 2
            for c, t, z in rows:
                loss -= math.log(softmax(sharpness * (t + weight * one * z))[c])
            if loss < best:
                best, found = loss, (weight * one, sharpness)
    return *found, len(rows)


def spread_of_others(scores: Vector, own: int) -> float:
    """The root mean square of what the scores of all classes but one differ by from the mean of all."""
    others = [(score - scores.mean()) ** 2 for c, score in enumerate(scores) if c != own]
    return math.sqrt(sum(others) / max(len(others), 1))


def unit(text: float, shots: float) -> float:
    """The weight at which both spread alike; none for scores that do not spread."""
    return text / shots if shots > 0.01 else 0.0


def eq_18(scores: Vector) -> Vector:
    """Responsibilities r = softmax(1.5 F), but for those below 1e-4."""
    return np.array([0.0 if share < 1e-4 else share for share in softmax(1.5 * scores)])


@dataclass(frozen=True, kw_only=True)
class Made:
    """g, P, the A_c and w, made anew now and then."""

    g: Vector
    p: Matrix
    a: Matrix
    w: float
    temperature: float


def eq_19(text: Matrix, shots: Sums, traffic: Sums, gamma: float, lean: float, tau: float) -> Made:
    """A_c = S_c - s_c g + (t_c - mean t) / 2; w = gamma + tau lean e / (e + 40 C); P of the whole."""
    classes = len(text)
    images = shots.images + traffic.images
    g = (shots.total + traffic.total) / max(images, 1)
    scatter, a = (shots.second + traffic.second) / max(images, 1), np.zeros_like(text)
    for c in range(classes):
        s, count = shots.sums[c] + traffic.sums[c], shots.counts[c] + traffic.counts[c]
        a[c] = s - count * g + (text[c] - text.mean(0)) / 2
        scatter -= np.outer(s, s) / max(count, 1e-12) / max(images, 1)
    e = traffic.images + (10 * shots.images if gamma > 0 else 0)
    return Made(
        g=g,
        p=precision(scatter, images, 4.0),
        a=a,
        w=gamma + tau * lean * e / (e + 40 * classes),
        temperature=eq_22(traffic),
    )


def eq_20(made: Made, x: Vector, r: Vector) -> Vector:
    """z_c = cos_P(x - g, A_c + r_c / 4 (x - g))."""
    v = x - made.g
    return np.array([cosine(a + share / 4 * v, made.p, v) for a, share in zip(made.a, r, strict=True)])


def eq_21(text: Vector, w: float, z: Vector) -> Vector:
    """L_c = log p_text,c + w z_c."""
    return text + w * z


def level(scores: Vector, reference: Vector) -> Vector:
    """Scores whose standard deviation over the classes is the reference's."""
    return scores * (reference.std() / max(scores.std(), 1e-12))


def eq_22(traffic: Sums) -> float:
    """The log of the temperature nearest to 1 at which agreement is what the frozen branches claim, within 1e-3.

    Of that, n / (n + 32).
    """
    if traffic.images == 0:
        return 0.0
    gaps = [(agreed - traffic.sure) / traffic.images for agreed in traffic.agreed]
    ends = []
    for wanted in (1e-3, -1e-3):
        found = STEPS[-1]
        for k, gap in enumerate(gaps):
            if gap <= wanted:
                found = STEPS[k] if k == 0 else STEPS[k - 1] + 0.25 * (gaps[k - 1] - wanted) / (gaps[k - 1] - gap)
                break
        ends.append(found)
    nearest = ends[0] if ends[0] > 0 else min(ends[1], 0.0)
    return nearest * traffic.images / (traffic.images + 32)


@dataclass
class Auto:
    """A tenant with the method `auto`, image after image; changed in place."""

    text: Matrix
    shots: Sequence[Sequence[Vector]]
    tau: float
    gamma: float
    lean: float
    sharpness: float
    held_out: int
    traffic: Sums
    made_at: int = 0
    made: Made = field(init=False)

    def __post_init__(self) -> None:
        self.remade()

    def remade(self) -> None:
        """Make anew what is read."""
        own = shots_of(self.shots, self.text.shape[1])
        self.made, self.made_at = (
            eq_19(self.text, own, self.traffic, self.gamma, self.lean, self.tau),
            self.traffic.images,
        )

    def step(self, x: Vector, *, head: Matrix | None = None, count: bool = True) -> tuple[Vector, Vector]:
        """Return the statistics' and the fused probabilities of one image, and then count it."""
        weights = self.text if head is None else head
        text = np.log(softmax(np.array([self.tau * dot(t, x) for t in weights])))
        scores = eq_17(text, self.gamma, shown(self.shots, x) if any(len(own) for own in self.shots) else None)
        reference = self.sharpness * scores if self.held_out else text
        r = eq_18(scores)
        z = eq_20(self.made, x, r)
        even = level(eq_21(text, self.made.w, z), reference)
        answers = softmax(self.tau * z), softmax(even / math.exp(self.made.temperature))
        if count:
            self.count(x, r, even, softmax(reference))
        return answers

    def count(self, x: Vector, r: Vector, even: Vector, claimed: Vector) -> None:
        """Add one image to the sums, and make anew what is read at 1, 2, 4 .. 32, then every 32, then every 32nd."""
        self.traffic.add(x, r)
        first = int(claimed.argmax())
        self.traffic.sure += claimed[first]
        for k, step in enumerate(STEPS):
            p = softmax(even / math.exp(step))
            self.traffic.agreed[k] += (p[first] + p.max()) / 2
        if self.traffic.images >= self.made_at + max(1, min(self.made_at, 32), self.made_at // 32):
            self.remade()
