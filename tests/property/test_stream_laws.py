"""Laws of whole streams: what an image gets does not hang on batches, flags or neighbours."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from core.classify import Sample, classify
from core.memory.dynamic import Outcome
from core.prepared_banks import Shelves
from tests.property.worlds import World, array, branches, close, contents, joined, learned, run, worlds
from tests.support import literal
from tests.support.laws import examples

LITERAL = 2e-5
"""Largest difference between a float32 probability and the literal float64 one."""


def test_a_stream_gets_the_literal_answers() -> None:
    seen = dict.fromkeys(Outcome, 0)

    @given(worlds(read_only=True))
    def law(world: World) -> None:
        assume(world.certain())
        parts, memory = run(world.snapshot, world.samples, [])
        expected, banks = literal.stream(world.method(), world.images(), learn=[s.learn for s in world.samples])
        for name in ("text", "dynamic", "static", "fused"):
            rows = [getattr(answer, name) for answer in expected]
            if rows[0] is None:
                assert getattr(parts[0], name) is None
            else:
                np.testing.assert_allclose(joined(parts, name).numpy(), np.stack(rows), rtol=0, atol=LITERAL)
        for write, answer in zip(parts[0].writes, expected, strict=True):
            assert (write.outcome, write.candidate.label) == (answer.outcome, answer.label)
            assert (-1 if write.slot is None else write.slot) == answer.slot
            assert math.isclose(write.candidate.entropy, answer.entropy, abs_tol=LITERAL)
            seen[write.outcome] += 1
        for own, bank in zip(memory.classes, banks.banks, strict=True):
            assert own.ids == tuple(entry.id for entry in bank)
            np.testing.assert_allclose(own.entropies, [entry.entropy for entry in bank], rtol=0, atol=LITERAL)
            for key, entry in zip(own.keys, bank, strict=True):
                np.testing.assert_array_equal(array(key), entry.key)

    law()
    # A dozen small worlds fill slots for sure, and do something else to full banks.
    assert seen[Outcome.FILLED]
    assert seen[Outcome.REPLACED] + seen[Outcome.REJECTED] + seen[Outcome.DUPLICATE]


@st.composite
def repeated(draw: st.DrawFn) -> tuple[World, list[list[int]]]:
    """Draw a stream in which some images come again under their own id, and ways to cut it into batches."""
    world = draw(worlds(images=(8, 34), read_only=True))
    samples = list(world.samples)
    again = draw(st.lists(st.tuples(st.integers(0, len(samples) - 1), st.integers(0, len(samples))), max_size=6))
    for number, place in again:
        samples.insert(place, world.samples[number])
    cuts = [[1] * len(samples), [3] * len(samples), draw(st.lists(st.integers(1, 9), max_size=8))]
    return World(snapshot=world.snapshot, samples=tuple(samples)), cuts


@examples(6)
@given(repeated())
def test_batches_of_any_size_give_the_same_answers_and_the_same_memory(drawn: tuple[World, list[list[int]]]) -> None:
    world, cuts = drawn
    firsts = {sample.id: sample for sample in world.samples}
    assume(replace(world, samples=tuple(firsts.values())).certain())
    parts, memory = run(world.snapshot, world.samples, [32])
    for sizes in cuts:
        other_parts, other = run(world.snapshot, world.samples, sizes)
        for name in branches(parts[0]):
            close(joined(parts, name), joined(other_parts, name), LITERAL)  # rounding alone came to 1.06e-5
        outcomes = [[write.outcome for part in each for write in part.writes] for each in (parts, other_parts)]
        assert outcomes[0] == outcomes[1]
        for own, their in zip(memory.classes, other.classes, strict=True):
            assert own.ids == their.ids
            close(own.keys, their.keys)
            np.testing.assert_allclose(own.entropies, their.entropies, rtol=0, atol=LITERAL)


@given(worlds(images=(2, 12), read_only=True), st.integers(0, 11))
def test_an_answer_does_not_depend_on_who_comes_later(world: World, keep: int) -> None:
    keep = min(1 + keep, len(world.samples))
    some, every = (classify(Shelves(world.snapshot), samples) for samples in (world.samples[:keep], world.samples))
    for name, p in branches(some).items():
        close(p, branches(every)[name][:keep])


@given(worlds(images=(2, 8)), st.integers(0, 6))
def test_a_read_only_request_gets_the_answer_that_a_learning_one_would(world: World, number: int) -> None:
    shelves = Shelves(learned(world.snapshot, world.samples[:number]))
    for sample in world.samples:
        learning, reading = (classify(shelves, [replace(sample, learn=learn)]) for learn in (True, False))
        for name, p in branches(learning).items():
            assert torch.equal(p, branches(reading)[name])
        assert learning.writes[0].outcome == reading.writes[0].outcome
        assert reading.memory is shelves.snapshot.dynamic


@given(worlds(images=(2, 16)), st.booleans())
def test_read_only_requests_leave_the_state_bitwise_alone(world: World, repeat: bool) -> None:  # noqa: FBT001 - drawn
    half = len(world.samples) // 2
    snapshot = learned(world.snapshot, world.samples[:half])
    shelves, before = Shelves(snapshot), contents(snapshot.dynamic)
    scores = shelves.scores(torch.cat([s.views[:1] for s in world.samples]))
    readers = [replace(s, learn=False) for s in world.samples[0 if repeat else half :]]
    answers = classify(shelves, readers)
    assert answers.memory is snapshot.dynamic
    assert all(seen is snapshot.dynamic for seen in answers.seen)
    assert contents(answers.memory) == before
    unchanged = shelves.scores(torch.cat([s.views[:1] for s in world.samples]))
    assert all(
        a is b or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(scores, unchanged, strict=True)
    )


@given(worlds(images=(2, 16), read_only=True), st.sets(st.integers(0, 15)))
def test_a_write_that_may_not_be_stored_is_a_read_only_request(world: World, refused: set[int]) -> None:
    shelves = Shelves(world.snapshot)
    ours = classify(shelves, world.samples, lambda write: write.candidate.id not in refused)
    theirs = classify(shelves, [replace(s, learn=s.learn and s.id not in refused) for s in world.samples])
    for name, p in branches(ours).items():
        assert torch.equal(p, branches(theirs)[name])
    assert contents(ours.memory) == contents(theirs.memory)
    assert ours.learned == theirs.learned


@given(worlds(images=(1, 16)))
def test_learning_leaves_the_memory_that_it_started_from_alone(world: World) -> None:
    half = learned(world.snapshot, world.samples[: len(world.samples) // 2])
    shelves, before = Shelves(half), contents(half.dynamic)
    classify(shelves, world.samples)
    assert contents(half.dynamic) == before
    assert shelves.snapshot is half


@given(worlds(images=(1, 20), read_only=True))
def test_seen_is_the_memory_before_an_image_or_with_its_own_write(world: World) -> None:
    answers = classify(Shelves(world.snapshot), world.samples)
    before = world.snapshot.dynamic
    for sample, write, seen in zip(world.samples, answers.writes, answers.seen, strict=True):
        if sample.learn and write.slot is not None:
            assert seen.classes[write.candidate.label].ids[write.slot] == sample.id
        else:
            assert seen is before
        before = seen
    assert answers.memory is before


@given(worlds(images=(1, 20), read_only=True))
def test_an_image_that_was_learnt_and_comes_again_changes_nothing(world: World) -> None:
    memory = classify(Shelves(world.snapshot), world.samples).memory
    held = {number for own in memory.classes for number in own.ids}
    shelves = Shelves(replace(world.snapshot, dynamic=memory))
    for sample in world.samples:
        if sample.id in held:
            again = classify(shelves, [sample])
            assert again.writes[0].outcome == Outcome.DUPLICATE
            assert [own.ids for own in again.memory.classes] == [own.ids for own in memory.classes]


@given(worlds(images=(1, 8), with_offsets=False))
def test_a_second_copy_under_another_id_raises_its_own_pseudo_class(world: World) -> None:
    """Self-match: while there is room, one more slot that holds the query itself can only pull its class up."""
    snapshot = replace(world.snapshot, dynamic=replace(world.snapshot.dynamic, slots=50))
    sample = world.samples[0]
    (once, twice), _ = run(snapshot, [sample, replace(sample, id=1000)], [1])
    label = once.writes[0].candidate.label
    assert twice.dynamic[0, label] >= once.dynamic[0, label] - 1e-5


@given(worlds(with_views=False))
def test_one_view_decides_alone(world: World) -> None:
    answers = classify(Shelves(world.snapshot), world.samples)
    for p, write in zip(answers.text, answers.writes, strict=True):
        assert write.candidate.label == int(p.argmax())


@given(worlds(images=(1, 6)))
def test_equal_views_decide_as_one_view_does(world: World) -> None:
    plain = [replace(s, views=s.views[:1]) for s in world.samples]
    copies = [replace(s, views=s.views[:1].repeat(20, 1)) for s in world.samples]
    assume(replace(world, samples=tuple(plain)).certain())
    one, many = (classify(Shelves(world.snapshot), samples) for samples in (plain, copies))
    for name, p in branches(one).items():
        close(p, branches(many)[name])
    assert [w.outcome for w in one.writes] == [w.outcome for w in many.writes]


@given(worlds(read_only=True))
def test_probabilities_sum_to_one_and_entropies_stay_within_ln_c(world: World) -> None:
    answers = classify(Shelves(world.snapshot), world.samples)
    for p in branches(answers).values():
        assert p.dtype == torch.float32
        assert (p >= 0).all()
        close(p.sum(-1), torch.ones(len(p)))
    for write in answers.writes:
        assert -1e-6 <= write.candidate.entropy <= math.log(world.size[0]) + 1e-6


@given(worlds(images=(1, 12), read_only=True), st.randoms(use_true_random=False))
def test_permuting_classes_permutes_the_answers(world: World, random: object) -> None:
    assume(world.certain())
    snapshot, (classes, _) = world.snapshot, world.size
    order = list(range(classes))
    random.shuffle(order)  # type: ignore[attr-defined]
    places, given_offsets = torch.tensor(order), snapshot.projection
    permuted = replace(
        snapshot,
        text=snapshot.text[places],
        static=replace(snapshot.static, classes=tuple(snapshot.static.classes[c] for c in order)),
        projection=None
        if given_offsets is None
        else replace(given_offsets.of(places), query=given_offsets.query[places]),
    )
    ours, theirs = (classify(Shelves(each), world.samples) for each in (snapshot, permuted))
    for name, p in branches(ours).items():
        close(p[:, places], branches(theirs)[name])
    assert [ours.memory.classes[c].ids for c in order] == [own.ids for own in theirs.memory.classes]


@given(worlds(images=(1, 10), with_offsets=True))
def test_only_the_mean_of_the_query_offsets_matters(world: World) -> None:
    """b_q enters through Eq. (7) alone, which knows no class."""
    assume(world.certain())
    given_offsets = world.snapshot.projection
    assert given_offsets is not None
    mean = given_offsets.query.mean(0, keepdim=True).expand_as(given_offsets.query)
    tilt = 3.0 * (given_offsets.query - mean)
    ours = classify(Shelves(world.snapshot), world.samples)
    for query in (mean, given_offsets.query + tilt):
        other = replace(world.snapshot, projection=replace(given_offsets, query=query))
        theirs = classify(Shelves(other), world.samples)
        for name, p in branches(ours).items():
            close(p, branches(theirs)[name])


def _same(a: Sample, b: Sample) -> bool:
    return a.id == b.id and torch.equal(a.views, b.views)


@given(worlds(read_only=True))
def test_samples_are_left_as_they_came(world: World) -> None:
    copies = [replace(s, views=s.views.clone()) for s in world.samples]
    classify(Shelves(world.snapshot), world.samples)
    assert all(_same(a, b) for a, b in zip(world.samples, copies, strict=True))
