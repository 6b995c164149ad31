"""Laws of the dynamic memory: a streaming top-L that forgets the order in which it was told."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import core.classify
import core.memory.dynamic
import core.prepared_banks
import core.readout.projection
import core.readout.scores
import core.snapshot
from core.classify import Sample, classify
from core.evaluation.replay import Options, replay
from core.evaluation.stream_file import Stream
from core.memory.dynamic import Candidate, DynamicMemory, Outcome, apply, propose
from core.prepared_banks import Shelves
from core.snapshot import Snapshot
from tests.property.worlds import World, after, as_candidates, contents, gaussian, learned, worlds

CLASSES, DIM = 3, 4


@dataclass(frozen=True, kw_only=True)
class History:
    """Candidates for a memory of so many slots; an id may come several times, with one class."""

    candidates: tuple[Candidate, ...]
    slots: int
    dtype: torch.dtype = torch.float32

    @property
    def empty(self) -> DynamicMemory:
        return DynamicMemory.empty(CLASSES, DIM, self.slots, dtype=self.dtype)


NATS = st.one_of(st.sampled_from((0.0, 0.25, 0.5, 1.0)), st.floats(0.0, 1.1))
"""Few values, so that ties are common, and any values."""


@st.composite
def histories(draw: st.DrawFn, *, repeats: bool = True) -> History:
    """Draw up to 24 candidates with stable string ids; repeats differ in their last bits, or wholly."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    ids = st.integers(0, 14)
    drawn = draw(st.lists(st.tuples(ids, NATS), max_size=24, unique_by=None if repeats else lambda pair: pair[0]))
    keys = gaussian(rng, 15, DIM)
    jitter = draw(st.sampled_from((0.0, 1e-6, 1.0)), label="jitter")
    candidates = tuple(
        Candidate(
            label=number % CLASSES, key=keys[number] + jitter * gaussian(rng, DIM), entropy=nats, id=f"{number:x}"
        )
        for number, nats in drawn
    )
    dtype = draw(st.sampled_from((torch.float32, torch.float16)))
    return History(candidates=candidates, slots=draw(st.integers(0, 4), label="slots"), dtype=dtype)


@given(histories(), st.data())
def test_any_order_gives_the_same_memory(history: History, data: st.DataObject) -> None:
    order = data.draw(st.permutations(history.candidates))
    assert contents(after(history.empty, history.candidates)) == contents(after(history.empty, order))


@given(histories(), st.data())
def test_any_split_and_merge_gives_the_same_memory(history: History, data: st.DataObject) -> None:
    """Replicas that learn apart and then exchange what they hold agree, whoever tells whom first."""
    parts: list[list[Candidate]] = [[], [], []]
    for candidate in history.candidates:
        for part in data.draw(st.sets(st.integers(0, 2), min_size=1)):
            parts[part].append(candidate)
    replicas = [after(history.empty, part) for part in parts]
    told = data.draw(st.permutations(replicas))
    merged = history.empty
    for replica in told:
        merged = after(merged, as_candidates(replica))
    assert contents(merged) == contents(after(history.empty, history.candidates))
    assert contents(after(replicas[0], [c for r in told for c in as_candidates(r)])) == contents(merged)


@given(histories(), st.data())
def test_telling_it_twice_changes_nothing(history: History, data: st.DataObject) -> None:
    memory = after(history.empty, history.candidates)
    again = data.draw(st.permutations(history.candidates))
    assert contents(after(memory, again)) == contents(memory)


@given(histories())
def test_a_class_holds_its_smallest_samples_by_entropy_and_id(history: History) -> None:
    memory = after(history.empty, history.candidates)
    for label, own in enumerate(memory.classes):
        least: dict[int | str, float] = {}
        for candidate in history.candidates:
            if candidate.label == label:
                least[candidate.id] = min(candidate.entropy, least.get(candidate.id, np.inf))
        best = sorted((nats, number) for number, nats in least.items())[: history.slots]
        assert sorted(zip(own.entropies, own.ids, strict=True)) == best


@given(histories(), NATS, st.integers(0, CLASSES - 1))
def test_a_stale_copy_may_reject_what_it_rejects(history: History, nats: float, label: int) -> None:
    """The bound of a full class only falls: what an old copy turns away, every later one does too."""
    late = Candidate(label=label, key=torch.ones(DIM), entropy=nats, id="zz")
    refused = False
    memory = history.empty
    for candidate in history.candidates:
        refused = refused or propose(memory, late).outcome == Outcome.REJECTED
        memory = apply(memory, propose(memory, candidate))
        assert not refused or propose(memory, late).outcome == Outcome.REJECTED


@given(histories())
def test_at_most_one_slot_of_one_class_changes_an_image(history: History) -> None:
    memory = history.empty
    for candidate in history.candidates:
        write = propose(memory, candidate)
        now = apply(memory, write)
        for label, (old, new) in enumerate(zip(memory.classes, now.classes, strict=True)):
            if label != candidate.label or write.slot is None:
                assert new is old
                continue
            assert len(new) - len(old) == (write.outcome == Outcome.FILLED)
            assert len(new) <= history.slots
            for slot in range(len(old)):
                if slot != write.slot:
                    assert torch.equal(new.keys[slot], old.keys[slot])
                    assert (new.entropies[slot], new.ids[slot]) == (old.entropies[slot], old.ids[slot])
            assert (new.entropies[write.slot], new.ids[write.slot]) == (candidate.entropy, candidate.id)
            assert torch.equal(new.keys[write.slot], candidate.key.to(history.dtype))
        memory = now


@given(histories())
def test_the_largest_entropy_of_a_full_class_never_rises(history: History) -> None:
    memory = history.empty
    for candidate in history.candidates:
        now = apply(memory, propose(memory, candidate))
        for old, new in zip(memory.classes, now.classes, strict=True):
            if history.slots and len(old) == history.slots:
                assert len(new) == history.slots
                assert max(new.entropies) <= max(old.entropies)
        memory = now


@given(histories(repeats=False))
def test_a_free_slot_takes_any_entropy(history: History) -> None:
    memory = history.empty
    for candidate in history.candidates:
        write = propose(memory, candidate)
        assert (write.outcome == Outcome.FILLED) == (len(memory.classes[candidate.label]) < history.slots)
        memory = apply(memory, write)


@given(histories(), st.integers(0, CLASSES - 1))
def test_with_later_ids_an_equal_entropy_is_dropped(history: History, label: int) -> None:
    numbered = [replace(c, id=n) for n, c in enumerate(history.candidates)]
    memory = after(history.empty, numbered)
    own = memory.classes[label]
    if history.slots and len(own) == history.slots:
        late = Candidate(label=label, key=torch.ones(DIM), entropy=max(own.entropies), id=len(numbered))
        write = propose(memory, late)
        assert write.outcome == Outcome.REJECTED
        assert apply(memory, write) is memory


@given(histories())
def test_propose_and_apply_leave_the_memory_before_them_alone(history: History) -> None:
    memory = after(history.empty, history.candidates[: len(history.candidates) // 2])
    before = contents(memory)
    after(memory, history.candidates)
    assert contents(memory) == before


@given(histories())
def test_replaying_the_writes_gives_the_state_bit_for_bit(history: History) -> None:
    memory, log = history.empty, []
    for candidate in history.candidates:
        log.append(propose(memory, candidate))
        memory = apply(memory, log[-1])
    copy = history.empty
    for write in log:
        copy = apply(copy, write)
    assert contents(copy) == contents(memory)
    assert [own.ids for own in copy.classes] == [own.ids for own in memory.classes]


def test_answers_on_the_way_do_depend_on_the_order() -> None:
    """Only the memory at the end forgets the order: an early image is read from fewer slots than a late one."""
    differs = []

    @given(worlds(images=(4, 8), with_views=False))
    def law(world: World) -> None:
        there = classify(Shelves(world.snapshot), world.samples).dynamic
        back = classify(Shelves(world.snapshot), world.samples[::-1]).dynamic.flip(0)
        differs.append(not torch.allclose(there, back, atol=1e-3))

    law()
    assert any(differs)


@given(worlds(images=(2, 8), with_views=False), st.randoms(use_true_random=False))
def test_images_with_stable_ids_leave_one_memory_in_any_order(world: World, random: object) -> None:
    """Entropies come from the text head alone, so the order of a stream leaves no trace in the memory."""
    alone = [replace(s, id=f"{s.id:04x}") for s in world.samples if isinstance(s.id, int)]
    scattered = list(alone)
    random.shuffle(scattered)  # type: ignore[attr-defined]
    assert contents(_one_by_one(world.snapshot, alone)) == contents(_one_by_one(world.snapshot, scattered))


def _one_by_one(snapshot: Snapshot, samples: Sequence[Sample]) -> DynamicMemory:
    for sample in samples:
        snapshot = learned(snapshot, [sample])
    return snapshot.dynamic


# --- no label on the learning path ----------------------------------------------------------------------------------

LEARNING_PATH = (
    core.classify,
    core.memory.dynamic,
    core.prepared_banks,
    core.readout.scores,
    core.snapshot,
    core.readout.projection,
)
TRUTH = {"label", "labels", "target", "targets", "truth", "y", "y_true", "ground_truth", "gold"}


def test_no_function_of_the_learning_path_takes_a_label() -> None:
    named: list[object] = []
    for module in LEARNING_PATH:
        named += [f for _, f in inspect.getmembers(module, inspect.isfunction)]
        for _, kind in inspect.getmembers(module, inspect.isclass):
            # A candidate's label is its pseudo-label, Eq. (4).
            if kind.__module__.startswith("core.") and kind is not Candidate:
                named += [f for _, f in inspect.getmembers(kind, inspect.isfunction)]
    assert len(named) > 20
    for function in named:
        assert not TRUTH & set(inspect.signature(function).parameters), function


def test_a_sample_carries_no_label() -> None:
    assert {field.name for field in fields(Sample)} == {"views", "id", "learn", "count"}


@given(worlds(images=(3, 10)), st.integers(0, 2**32 - 1))
def test_labels_in_a_stream_change_nothing_but_the_figures(world: World, seed: int) -> None:
    (classes, dim), n = world.size, len(world.samples)
    shots = [own.keys for own in world.snapshot.static.classes]
    stream = Stream(
        text=world.snapshot.text,
        features=torch.stack([s.views[:1] for s in world.samples]),
        labels=None,
        shots=torch.cat(shots) if shots else torch.empty(0, dim),
        shot_labels=torch.repeat_interleave(torch.arange(classes), torch.tensor([len(own) for own in shots])),
        classnames=tuple(str(c) for c in range(classes)),
        projection=world.snapshot.projection,
        slots=2,
        beta=5.5,
        tau=100.0,
    )
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, classes, n))
    without, with_labels = (replay(each, Options()) for each in (stream, replace(stream, labels=labels)))
    ours, theirs = without.arrays(), with_labels.arrays()
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name])
    assert without.writes == with_labels.writes
