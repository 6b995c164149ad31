"""The loss of Eq. (16) and its gradients, held against the literal form in float64."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from core.memory.dynamic import DynamicMemory
from core.memory.static import Shots, StaticMemory
from core.prepared_banks import Shelves
from core.readout.projection import Projection
from core.snapshot import Snapshot
from core.training.objective import branch_scores, lesson_of, loss
from tests.support import literal

DIM = 6
NAMES = [field.name for field in fields(Projection)]


def snapshot_of(
    counts: list[int], *, seed: int = 0, dim: int = DIM, spread: float = 0.5, tau: float = 20.0
) -> Snapshot:
    rng = np.random.default_rng(seed)
    text = _unit(rng.standard_normal((len(counts), dim)) * spread + 1.0)
    shots = tuple(
        Shots(keys=_unit(row.numpy() + spread * rng.standard_normal((count, dim))), ids=tuple(range(count)))
        for row, count in zip(text, counts, strict=True)
    )
    return Snapshot(
        text=text, dynamic=DynamicMemory.empty(len(counts), dim, 3), static=StaticMemory(classes=shots), tau=tau
    )


def _unit(rows: np.ndarray) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(rows.astype(np.float32)), dim=-1)


def _offsets(classes: int, seed: int, size: float = 0.1) -> Projection:
    rng = np.random.default_rng(seed)
    return Projection(
        **{name: torch.from_numpy((size * rng.standard_normal((classes, DIM))).astype(np.float32)) for name in NAMES}
    )


def _literal(snapshot: Snapshot, offsets: Projection) -> literal.Method:
    return literal.Method(
        text=snapshot.text.double().numpy(),
        shots=[list(own.keys.double().numpy()) for own in snapshot.static.classes],
        offsets=literal.Offsets(**{name: getattr(offsets, name).double().numpy().copy() for name in NAMES}),
        slots=0,
        tau=snapshot.tau,
        beta=snapshot.beta,
    )


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("counts", [[2, 2], [3, 1, 2], [1, 4]])
def test_loss_and_gradients_are_those_of_the_literal_form(counts: list[int], left_out: bool) -> None:  # noqa: FBT001
    """Gradients of the loops by central differences in float64, for every one of the 5 C D offsets."""
    snapshot, offsets = snapshot_of(counts), _offsets(len(counts), 1)
    lesson = lesson_of(snapshot)
    trained = Projection(**{name: getattr(offsets, name).requires_grad_() for name in NAMES})
    own = loss(lesson, trained, lesson.keys, lesson.labels, lesson.ranks if left_out else None)
    own.backward()
    method = _literal(snapshot, Projection(**{name: getattr(trained, name).detach() for name in NAMES}))
    args = list(lesson.keys.double().numpy()), lesson.labels.tolist(), lesson.ranks.tolist() if left_out else None
    assert own.item() == pytest.approx(literal.eq_16(method, *args), rel=1e-5)
    for name in NAMES:
        expected = _differences(method, getattr(method.offsets, name), args)
        torch.testing.assert_close(getattr(trained, name).grad.double(), expected, rtol=1e-3, atol=2e-5)


def _differences(method: literal.Method, values: np.ndarray, args: tuple, step: float = 1e-5) -> Tensor:
    out = np.zeros_like(values)
    for at in np.ndindex(*values.shape):
        was = values[at]
        values[at] = was + step
        above = literal.eq_16(method, *args)
        values[at] = was - step
        out[at] = (above - literal.eq_16(method, *args)) / (2 * step)
        values[at] = was
    return torch.from_numpy(out)


def test_untrained_offsets_give_the_training_free_loss() -> None:
    snapshot = snapshot_of([3, 2, 1])
    lesson = lesson_of(snapshot)
    _, static = Shelves(snapshot).scores(lesson.keys)
    text = snapshot.tau * lesson.keys @ snapshot.text.T
    cross_entropy = torch.nn.functional.cross_entropy
    expected = cross_entropy(static, lesson.labels) + cross_entropy(text, lesson.labels)
    torch.testing.assert_close(loss(lesson, Projection.zeros(3, DIM), lesson.keys, lesson.labels), expected)


def test_a_shot_that_is_left_out_has_no_say() -> None:
    """Leaving the first of each class out reads the same as a memory without them."""
    snapshot = snapshot_of([3, 2, 4])
    lesson, offsets = lesson_of(snapshot), _offsets(3, 5)
    fewer = StaticMemory(classes=tuple(Shots(keys=own.keys[1:], ids=own.ids[1:]) for own in snapshot.static.classes))
    rest = lesson_of(replace(snapshot, static=fewer))
    first = torch.zeros(len(lesson.keys), dtype=torch.long)
    torch.testing.assert_close(
        branch_scores(lesson, offsets, lesson.keys, first), branch_scores(rest, offsets, lesson.keys)
    )


def test_a_lesson_of_some_rows_holds_those_shots_alone() -> None:
    snapshot = snapshot_of([3, 2])
    lesson = lesson_of(snapshot, torch.tensor([0, 2, 4]))
    assert lesson.counts.tolist() == [2, 1]
    assert lesson.labels.tolist() == [0, 0, 1]
    assert lesson.ranks.tolist() == [0, 1, 0]
    torch.testing.assert_close(lesson.keys[2], snapshot.static.classes[1].keys[1])


def test_a_lesson_made_in_inference_mode_can_be_learned_from() -> None:
    with torch.inference_mode():
        snapshot = snapshot_of([2, 2])
        lesson = lesson_of(replace(snapshot, text=snapshot.text * 1.0))
    own = Projection(**{name: torch.zeros(2, DIM, requires_grad=True) for name in NAMES})
    loss(lesson, own, lesson.keys, lesson.labels).backward()
    assert all(getattr(own, name).grad.isfinite().all() for name in NAMES)
