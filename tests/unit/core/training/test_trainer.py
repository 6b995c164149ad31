"""Few-shot training as a whole: what it gives, what it refuses, and that it disturbs nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from threading import Event

import pytest
import torch

from core.errors import UnfitShots
from core.prepared_banks import Shelves
from core.readout.projection import Projection
from core.snapshot import Snapshot
from core.training.objective import lesson_of, loss
from core.training.recipe import MOST_UNEQUAL, Queries, Recipe, Trained, check, needed_bytes
from core.training.trainer import _Run, course
from tests.unit.core.training.test_objective import DIM, snapshot_of

FAST = Recipe(epochs=6, learning_rate=0.005)


def _numbers(projection: Projection | None) -> torch.Tensor:
    assert projection is not None
    return torch.cat([getattr(projection, field.name).flatten() for field in fields(Projection)])


def train(snapshot: Snapshot, recipe: Recipe = FAST, queries: Queries | None = None) -> Trained:
    steps = course(snapshot, recipe, queries)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _teachable(counts: list[int]) -> Snapshot:
    """Return shots that agree with each other, and class weights that belong to the next class."""
    snapshot = snapshot_of(counts)
    return replace(snapshot, text=snapshot.text.roll(1, 0))


def test_training_lowers_the_loss_that_it_is_for() -> None:
    snapshot = _teachable([6, 6, 6])
    trained, lesson = train(snapshot), lesson_of(snapshot)
    assert trained.projection is not None
    before = loss(lesson, Projection.zeros(3, DIM), lesson.keys, lesson.labels)
    assert loss(lesson, trained.projection, lesson.keys, lesson.labels) < before
    assert trained.losses[-1] < trained.losses[0]
    assert len(trained.losses) == trained.epochs


def test_five_offsets_a_class_and_entry_are_trained() -> None:
    numbers = _numbers(train(_teachable([3, 3, 3])).projection)
    assert numbers.numel() == 5 * 3 * DIM
    assert (numbers != 0).all()


def test_no_step_leaves_the_offsets_at_zero() -> None:
    trained = train(snapshot_of([1, 1]), Recipe(epochs=3, learning_rate=0.0))
    assert not _numbers(trained.projection).any()


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_gives_the_same_offsets_to_the_bit(seed: int) -> None:
    snapshot, recipe = _teachable([5, 4, 3]), replace(FAST, seed=seed)
    assert torch.equal(_numbers(train(snapshot, recipe).projection), _numbers(train(snapshot, recipe).projection))


def test_another_seed_holds_out_other_shots() -> None:
    snapshot = _teachable([8, 8])
    assert train(snapshot).held_out != train(snapshot, replace(FAST, seed=1)).held_out


def test_other_threads_neither_disturb_a_training_nor_are_disturbed() -> None:
    snapshot, over = _teachable([4, 4]), Event()
    alone = _numbers(train(snapshot).projection)

    def noise() -> None:
        while not over.is_set():
            torch.manual_seed(1)
            torch.rand(8)

    with ThreadPoolExecutor() as pool:
        pool.submit(noise)
        beside = _numbers(train(snapshot).projection)
        over.set()
    assert torch.equal(alone, beside)
    state = torch.random.get_rng_state()
    train(snapshot)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_trains_within_inference_mode_too() -> None:
    snapshot = _teachable([4, 4])
    with torch.inference_mode():
        inside = _numbers(train(snapshot).projection)
    assert torch.equal(inside, _numbers(train(snapshot).projection))


def test_the_memory_is_left_as_it_is() -> None:
    snapshot = snapshot_of([4, 4])
    before = [own.keys.clone() for own in snapshot.static.classes]
    dynamic = snapshot.dynamic
    train(snapshot)
    assert snapshot.dynamic is dynamic
    assert all(torch.equal(own.keys, keys) for own, keys in zip(snapshot.static.classes, before, strict=True))


def test_it_tells_of_each_step_how_far_it_is() -> None:
    told = list(course(_teachable([4, 4]), FAST))
    shares = [progress.done for progress in told]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert sorted({progress.epoch for progress in told if progress.phase == "held-out"}) == [1, 2, 3, 4, 5, 6]
    assert all(progress.accuracy is not None for progress in told)


def test_the_pass_with_the_lowest_held_out_loss_is_taken() -> None:
    trained = train(_teachable([6, 6]))
    losses = [one for one, _ in trained.held_out]
    assert len(losses) == 1 + FAST.epochs
    assert losses[trained.epochs] == min(losses)


def test_shots_that_teach_nothing_are_not_trained_on() -> None:
    """Class weights that are right already, and steps far too large."""
    trained = train(snapshot_of([4, 4], spread=0.3, seed=3), Recipe(epochs=4, learning_rate=9.0))
    assert trained.projection is None
    assert trained.epochs == 0
    assert trained.after == trained.before


def test_one_shot_a_class_is_trained_on_whole() -> None:
    trained = train(snapshot_of([1, 1, 1]))
    assert trained.projection is not None
    assert trained.epochs == FAST.epochs
    assert trained.before is None
    assert trained.held_out == ()


def test_a_shot_is_left_out_where_its_class_has_another_and_kept_where_it_has_none() -> None:
    """The first step's loss, before any offset has moved, tells what the static branch has read."""
    for counts, left_out in (([1, 1, 1], False), ([1, 3, 3], False), ([2, 2, 2], True)):
        snapshot = _teachable(counts)
        lesson, zeros = lesson_of(snapshot), Projection.zeros(3, DIM)
        ranks = lesson.ranks if left_out else None
        run = _Run(lesson, FAST, None, torch.arange(sum(counts)), phase="all", epochs=1, span=(0.0, 1.0))
        expected = loss(lesson, zeros, lesson.keys, lesson.labels, ranks).item()
        assert [step.loss for step in run.once(0)] == pytest.approx([expected], rel=1e-5)


def test_queries_of_their_own_are_trained_on_pass_by_pass() -> None:
    snapshot, asked = snapshot_of([1, 1]), []

    def turned(number: int) -> torch.Tensor:
        asked.append(number)
        return lesson_of(snapshot).keys.flip(0)

    other = train(snapshot, FAST, turned)
    assert other is not None
    assert asked == list(range(FAST.epochs))
    assert not torch.equal(_numbers(other.projection), _numbers(train(snapshot).projection))


def test_a_step_moves_scores_alike_at_every_logit_scale() -> None:
    assert Recipe().rate(100.0) == pytest.approx(1e-4)
    assert Recipe().rate(20.0) == pytest.approx(5e-4)
    assert Recipe(learning_rate=0.3).rate(20.0) == 0.3


def test_no_offset_moves_further_than_its_steps_allow() -> None:
    numbers = _numbers(train(snapshot_of([1, 1]), Recipe(epochs=4, learning_rate=0.01)).projection)
    assert numbers.abs().max() <= 4 * 0.01 * (1 + 1e-3)


def test_untrained_offsets_answer_as_none_do() -> None:
    snapshot = snapshot_of([3, 3])
    x = lesson_of(snapshot).keys
    bare, zeros = Shelves(snapshot), Shelves(replace(snapshot, projection=Projection.zeros(2, DIM)))
    torch.testing.assert_close(bare.scores(x), zeros.scores(x))


@pytest.mark.parametrize(
    ("counts", "why"),
    [
        ([0, 0], "two classes"),
        ([3, 0, 0], "two classes"),
        ([3], "two classes"),
        ([2, 2, 0], "no shot"),
        ([1, MOST_UNEQUAL + 1], "times as many"),
    ],
)
def test_unfit_shots_are_refused_with_the_reason(counts: list[int], why: str) -> None:
    with pytest.raises(UnfitShots, match=why):
        train(snapshot_of(counts), FAST)


def test_a_training_that_runs_out_of_numbers_ends_with_a_reason() -> None:
    endless = torch.full((2, DIM), torch.inf)
    with pytest.raises(UnfitShots, match="smaller learning rate"):
        train(snapshot_of([1, 1]), FAST, lambda _: endless)


def test_shots_just_equal_enough_are_taken() -> None:
    check([1, MOST_UNEQUAL])


def test_what_a_training_takes_grows_with_classes_and_with_the_largest_of_them() -> None:
    assert needed_bytes([4] * 10, 8) == 10 * needed_bytes([4], 8)
    assert needed_bytes([1, 9], 8) == needed_bytes([9, 9], 8) > needed_bytes([8, 8], 8)
