"""Laws of the method `auto`: what an image gets, what is counted of it, and what traffic cannot change."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from core.adaptive.adaptation import Adaptation, Adapted
from core.adaptive.frozen_branches import Frozen
from core.adaptive.statistics import Statistics
from core.classify import Answers, Sample, classify
from core.memory.static import Shots, StaticMemory
from core.prepared_banks import Shelves
from core.snapshot import Snapshot
from tests.property.worlds import World, array, branches, close, joined, worlds
from tests.support import literal_auto
from tests.support.laws import examples
from tests.support.literal import u

BATCHES = {"fused": 2e-4, "statistics": 2e-3}
"""Largest difference that batches make: rounding, over the length of what images differ by from their mean, times tau.

Fused answers of nine in ten streams differ by less than 1e-5; images near the mean of all differ most.
"""

FROM_LABELS = tuple(field.name for field in fields(Statistics) if field.name != "agreed")
"""What is counted by the frozen branches alone."""


def auto(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot under the method `auto`, with nothing counted."""
    return replace(snapshot, adaptation=Adaptation.begin(snapshot.text, snapshot.static, snapshot.tau))


def adaptation_of(snapshot: Snapshot) -> Adaptation:
    """Return what a snapshot under `auto` has."""
    assert snapshot.adaptation is not None
    return snapshot.adaptation


def run(snapshot: Snapshot, samples: Sequence[Sample], size: int) -> tuple[list[Answers], Snapshot]:
    """Send samples in batches of a size."""
    shelves, parts = Shelves(snapshot), []
    for start in range(0, len(samples), size):
        answers = classify(shelves, samples[start : start + size])
        snapshot = replace(snapshot, dynamic=answers.memory, adaptation=answers.adaptation)
        shelves.advance(snapshot)
        parts.append(answers)
    return parts, snapshot


def grown(world: World, number: int) -> Snapshot:
    """Return the world's snapshot under `auto` after its first images."""
    return run(auto(world.snapshot), world.samples[:number], 32)[1]


def parts_of(answers: Answers) -> dict[str, Tensor]:
    """Return all branches of answers under `auto`."""
    assert answers.statistics is not None
    return {**branches(answers), "statistics": answers.statistics}


def same(ours: Statistics, theirs: Statistics, names: Sequence[str] = FROM_LABELS) -> None:
    """Assert that sums agree but for rounding."""
    for name in names:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)


def equal(ours: Statistics, theirs: Statistics) -> None:
    """Assert that sums agree to the last bit."""
    for field in fields(Statistics):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name))


@given(worlds(images=(2, 40), read_only=True))
def test_a_stream_gets_the_literal_answers(world: World) -> None:
    snapshot, text = auto(world.snapshot), array(world.snapshot.text)
    frozen, method = adaptation_of(snapshot).frozen, world.method()
    plain = literal_auto.Auto(
        text=text,
        shots=method.shots,
        tau=snapshot.tau,
        gamma=frozen.weight,
        lean=frozen.lean,
        sharpness=frozen.sharpness,
        held_out=frozen.held_out,
        traffic=literal_auto.Sums.none(*text.shape),
    )
    head = np.stack([u(t + b) for t, b in zip(text, method.offsets.text, strict=True)])
    parts, _ = run(snapshot, world.samples, 7)
    for row, sample in enumerate(world.samples):
        statistics, fused = plain.step(array(sample.views[0]), head=head, count=sample.learn)
        for name, expected in (("statistics", statistics), ("fused", fused)):
            np.testing.assert_allclose(joined(parts, name)[row].numpy(), expected, rtol=0, atol=BATCHES[name])


@given(worlds(with_shots=False, images=(1, 12)))
def test_without_shots_and_counted_images_the_answer_is_that_of_the_text_head(world: World) -> None:
    answers = classify(Shelves(auto(world.snapshot)), [replace(sample, learn=False) for sample in world.samples])
    close(answers.fused, answers.text, 1e-6)


@given(worlds(images=(2, 40)), st.randoms(use_true_random=False))
def test_any_order_of_a_stream_gives_the_same_sums(world: World, shuffle: random.Random) -> None:
    other = list(world.samples)
    shuffle.shuffle(other)
    ours, theirs = (run(auto(world.snapshot), samples, 5)[1] for samples in (world.samples, other))
    same(adaptation_of(ours).statistics, adaptation_of(theirs).statistics)


@given(worlds(images=(2, 40)), st.integers(1, 39))
def test_two_halves_of_a_stream_counted_apart_add_up_to_the_whole(world: World, first: int) -> None:
    ends = [
        adaptation_of(run(auto(world.snapshot), samples, 8)[1]).statistics
        for samples in (world.samples[:first], world.samples[first:], world.samples)
    ]
    same(ends[0] + ends[1], ends[2])
    assert ends[2].images == len(world.samples)


@examples(5)
@given(worlds(images=(64, 75), read_only=True))
def test_batches_of_any_size_give_the_same_answers_also_across_refreshes(world: World) -> None:
    parts, ours = run(auto(world.snapshot), world.samples, 64)
    for size in (1, 3, 32):
        other_parts, theirs = run(auto(world.snapshot), world.samples, size)
        for name, tolerance in BATCHES.items():
            close(joined(parts, name), joined(other_parts, name), tolerance)
        same(adaptation_of(ours).statistics, adaptation_of(theirs).statistics, [f.name for f in fields(Statistics)])
        assert adaptation_of(ours).made_at == adaptation_of(theirs).made_at


@given(worlds(images=(2, 40)), st.integers(0, 39))
def test_a_read_only_image_gets_the_answer_that_a_learning_one_gets(world: World, number: int) -> None:
    shelves = Shelves(grown(world, number))
    for sample in world.samples[-5:]:
        learning, reading = (classify(shelves, [replace(sample, learn=learn)]) for learn in (True, False))
        for name, p in parts_of(learning).items():
            assert torch.equal(p, parts_of(reading)[name])


@given(worlds(images=(2, 40)), st.integers(0, 39))
def test_read_only_images_leave_the_adaptation_bitwise_alone(world: World, number: int) -> None:
    snapshot = grown(world, number)
    before = adaptation_of(snapshot)
    copies = {f.name: getattr(before.statistics, f.name).clone() for f in fields(Statistics)}
    directions = before.directions.directions.clone()
    answers = classify(Shelves(snapshot), [replace(sample, learn=False) for sample in world.samples])
    assert answers.adaptation is before
    assert all(torch.equal(getattr(before.statistics, name), copy) for name, copy in copies.items())
    assert torch.equal(before.directions.directions, directions)


@given(worlds(images=(2, 40)), st.integers(0, 39))
def test_learning_leaves_the_adaptation_that_it_started_from_alone(world: World, number: int) -> None:
    snapshot = grown(world, number)
    before = adaptation_of(snapshot).statistics
    copies = {f.name: getattr(before, f.name).clone() for f in fields(Statistics)}
    classify(Shelves(snapshot), world.samples)
    assert all(torch.equal(getattr(before, name), copy) for name, copy in copies.items())


@given(worlds(images=(2, 30)), st.integers(0, 29))
def test_an_image_that_does_not_count_leaves_the_statistics_alone_and_is_learned(world: World, number: int) -> None:
    snapshot = grown(world, number)
    plain, uncounted = (
        classify(Shelves(snapshot), [replace(sample, count=count) for sample in world.samples[-1:]])
        for count in (True, False)
    )
    assert uncounted.adaptation is snapshot.adaptation
    assert uncounted.learned == plain.learned
    for name, p in parts_of(plain).items():
        assert torch.equal(p, parts_of(uncounted)[name])
    counted = adaptation_of(replace(snapshot, adaptation=plain.adaptation)).statistics
    assert counted.images == adaptation_of(snapshot).statistics.images + 1


@given(worlds(images=(2, 20)))
def test_images_that_do_not_count_among_others_are_as_if_they_were_not_there(world: World) -> None:
    mixed = [replace(sample, count=at % 2 == 0) for at, sample in enumerate(world.samples)]
    ours = run(auto(world.snapshot), mixed, 32)[1]
    theirs = run(auto(world.snapshot), [sample for sample in mixed if sample.count], 32)[1]
    same(adaptation_of(ours).statistics, adaptation_of(theirs).statistics, [f.name for f in fields(Statistics)])


@given(worlds(images=(2, 40)), st.floats(-2.0, 2.0))
def test_calibration_never_changes_who_is_first(world: World, temperature: float) -> None:
    snapshot = grown(world, len(world.samples) // 2)
    before = adaptation_of(snapshot)
    plain, other = (
        replace(before, directions=replace(before.directions, temperature=each)) for each in (0.0, temperature)
    )
    readers = [replace(sample, learn=False) for sample in world.samples]
    ours, theirs = (classify(Shelves(replace(snapshot, adaptation=each)), readers).fused for each in (plain, other))
    firsts = ours.argmax(-1, keepdim=True)
    close(theirs.gather(1, firsts)[:, 0], theirs.amax(-1), 1e-6)


@given(worlds(images=(2, 30)), st.integers(1, 29), st.integers(0, 29))
def test_labels_and_entropies_do_not_depend_on_traffic(world: World, number: int, seen: int) -> None:
    before, after = Shelves(auto(world.snapshot)), Shelves(grown(world, number))
    sample = world.samples[min(seen, len(world.samples) - 1)]
    ours, theirs = (classify(shelves, [sample]).writes[0].candidate for shelves in (before, after))
    assert (ours.label, ours.entropy) == (theirs.label, theirs.entropy)


@given(worlds(images=(2, 30)), st.randoms(use_true_random=False))
def test_the_dynamic_memory_is_the_same_after_any_order(world: World, shuffle: random.Random) -> None:
    other = list(world.samples)
    shuffle.shuffle(other)
    # One at a time: the last bit of an entropy hangs on the size of the batch, and so might a tie.
    ours, theirs = (run(auto(world.snapshot), samples, 1)[1].dynamic for samples in (world.samples, other))
    assert [set(own.ids) for own in ours.classes] == [set(own.ids) for own in theirs.classes]


@given(worlds(with_shots=False, images=(2, 30), read_only=True))
def test_without_shots_the_dynamic_memory_is_that_of_the_papers_method(world: World) -> None:
    parts, ours = run(auto(world.snapshot), world.samples, 8)
    plain, theirs = run(world.snapshot, world.samples, 8)
    assert [own.ids for own in ours.dynamic.classes] == [own.ids for own in theirs.dynamic.classes]
    for name in ("text", "dynamic"):
        assert torch.equal(joined(parts, name), joined(plain, name))


@given(worlds(images=(2, 20), read_only=True))
def test_all_probabilities_are_finite_and_sum_to_one(world: World) -> None:
    parts, _ = run(auto(world.snapshot), world.samples, 6)
    for part in parts:
        for p in parts_of(part).values():
            assert p.dtype == torch.float32
            assert (p >= 0).all()
            close(p.sum(-1), torch.ones(len(p)))


def _permuted(snapshot: Snapshot, order: list[int]) -> Snapshot:
    places, offsets = torch.tensor(order), snapshot.projection
    return replace(
        snapshot,
        text=snapshot.text[places],
        static=StaticMemory(classes=tuple(snapshot.static.classes[c] for c in order)),
        projection=None if offsets is None else replace(offsets.of(places), query=offsets.query[places]),
    )


@given(worlds(images=(2, 40)), st.randoms(use_true_random=False))
def test_permuting_classes_permutes_everything(world: World, shuffle: random.Random) -> None:
    assume(world.certain())
    order = list(range(world.size[0]))
    shuffle.shuffle(order)
    parts, ours = run(auto(world.snapshot), world.samples, 8)
    other_parts, theirs = run(auto(_permuted(world.snapshot, order)), world.samples, 8)
    for name in ("statistics", "fused", "dynamic"):
        close(joined(parts, name)[:, order], joined(other_parts, name), BATCHES.get(name, 1e-5))
    frozen, other = adaptation_of(ours).frozen, adaptation_of(theirs).frozen
    assert math.isclose(frozen.weight, other.weight, rel_tol=1e-3, abs_tol=1e-6)
    assert (frozen.sharpness, frozen.held_out) == (other.sharpness, other.held_out)
    sums, their = adaptation_of(ours).statistics, adaptation_of(theirs).statistics
    torch.testing.assert_close(sums.sums[order], their.sums, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sums.second, their.second)
    assert [ours.dynamic.classes[c].ids for c in order] == [own.ids for own in theirs.dynamic.classes]


@given(worlds(images=(2, 40), with_offsets=False), st.integers(0, 2**32 - 1))
def test_an_added_class_without_evidence_leaves_everything_finite(world: World, seed: int) -> None:
    classes, dim = world.size
    snapshot = grown(world, len(world.samples))
    known = adaptation_of(snapshot).statistics
    more = replace(
        known, sums=torch.cat((known.sums, torch.zeros(1, dim))), counts=torch.cat((known.counts, torch.zeros(1)))
    )
    extra = torch.nn.functional.normalize(torch.randn(1, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)
    nothing = Shots(keys=torch.empty(0, dim), ids=())
    text, static = torch.cat((snapshot.text, extra)), StaticMemory(classes=(*snapshot.static.classes, nothing))
    wider = replace(
        world.snapshot,
        text=text,
        static=static,
        dynamic=replace(snapshot.dynamic, classes=(*snapshot.dynamic.classes, world.snapshot.dynamic.classes[0])),
        adaptation=Adaptation.begin(text, static, snapshot.tau, more),
    )
    parts, _ = run(wider, world.samples, 8)
    for name in ("statistics", "fused"):
        p = joined(parts, name)
        assert p.shape[1] == classes + 1
        assert torch.isfinite(p).all()


# --- shots of every kind --------------------------------------------------------------------------------------------


def _shots(world: World, numbers: Sequence[int], seed: int) -> StaticMemory:
    drawn = torch.Generator().manual_seed(seed)
    keys = (
        torch.nn.functional.normalize(t + 0.3 * torch.randn(number, len(t), generator=drawn), dim=-1)
        for t, number in zip(world.snapshot.text, numbers, strict=True)
    )
    return StaticMemory(classes=tuple(Shots(keys=own, ids=tuple(range(len(own)))) for own in keys))


KINDS = {
    "one class alone": lambda classes: [4] + [0] * (classes - 1),
    "one a class": lambda classes: [1] * classes,
    "many of one class": lambda classes: [300] + [1] * (classes - 1),
    "two of some": lambda classes: [2 * (c % 2) for c in range(classes)],
}


@pytest.mark.parametrize("kind", KINDS)
@examples(10)
@given(worlds(images=(34, 40), with_shots=False), st.integers(0, 2**32 - 1), st.sampled_from((1.0, 100.0, 1000.0)))
def test_shots_of_any_kind_give_finite_answers(kind: str, world: World, seed: int, tau: float) -> None:
    static = _shots(world, KINDS[kind](world.size[0]), seed)
    parts, end = run(auto(replace(world.snapshot, static=static, tau=tau)), world.samples, 8)
    assert 0.0 <= adaptation_of(end).frozen.weight <= 100 * tau
    for name in ("statistics", "fused"):
        assert torch.isfinite(joined(parts, name)).all()


@examples(10)
@given(worlds(images=(2, 10)), st.integers(1, 5), st.booleans())
def test_duplicates_of_one_shot_give_finite_answers(world: World, number: int, of_all: bool) -> None:  # noqa: FBT001 - drawn
    first = _shots(world, [1] * world.size[0], 0).classes
    keys = [(first[0] if of_all else own).keys.expand(number, -1) for own in first]
    static = StaticMemory(classes=tuple(Shots(keys=own, ids=tuple(range(number))) for own in keys))
    parts, end = run(auto(replace(world.snapshot, static=static)), world.samples, 4)
    assert math.isfinite(adaptation_of(end).frozen.weight)
    assert not of_all or adaptation_of(end).frozen.weight == 0.0
    assert all(torch.isfinite(part.fused).all() for part in parts)


@given(worlds(images=(2, 10), with_shots=False), st.integers(1, 3))
def test_shots_of_one_class_leave_the_first_answer_to_the_text_head(world: World, number: int) -> None:
    static = _shots(world, [number] + [0] * (world.size[0] - 1), 0)
    answers = classify(Shelves(auto(replace(world.snapshot, static=static))), world.samples[:1])
    close(answers.fused, answers.text, 1e-6)


@examples(10)
@given(worlds(images=(2, 10), with_shots=True))
def test_a_half_precision_static_memory_is_read_as_what_it_holds(world: World) -> None:
    half, single = (
        StaticMemory(
            classes=tuple(replace(own, keys=own.keys.half().to(dtype)) for own in world.snapshot.static.classes)
        )
        for dtype in (torch.float16, torch.float32)
    )
    ours, theirs = (run(auto(replace(world.snapshot, static=each)), world.samples, 4)[0] for each in (half, single))
    for name in ("statistics", "fused"):
        assert torch.equal(joined(ours, name), joined(theirs, name))


@given(worlds(images=(2, 40), with_shots=False))
def test_one_class_alone_is_always_the_answer(world: World) -> None:
    nothing = StaticMemory(classes=world.snapshot.static.classes[:1])
    alone = replace(
        world.snapshot,
        text=world.snapshot.text[:1],
        static=nothing,
        projection=None,
        dynamic=replace(world.snapshot.dynamic, classes=world.snapshot.dynamic.classes[:1]),
    )
    for static in (nothing, StaticMemory(classes=(Shots(keys=world.samples[0].views[:1], ids=(0,)),))):
        parts, end = run(auto(replace(alone, static=static)), world.samples, 8)
        assert torch.equal(joined(parts, "fused"), torch.ones(len(world.samples), 1))
        assert adaptation_of(end).frozen.weight == 0.0


def test_without_the_method_there_is_no_branch_of_statistics() -> None:
    @examples(3)
    @given(worlds())
    def law(world: World) -> None:
        answers = classify(Shelves(world.snapshot), world.samples)
        assert answers.adapted is None
        assert answers.statistics is None
        assert answers.adaptation is None
        assert isinstance(classify(Shelves(auto(world.snapshot)), world.samples).adapted, Adapted)

    law()
    assert Frozen().held_out == 0
