"""Laws of the readout: what it depends on, what it does not, and that the fast form is the plain one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.classify import classify
from core.memory.bank import Slots, pack
from core.memory.dynamic import DynamicMemory
from core.numerics import unit
from core.prepared_banks import Shelves
from core.readout.projection import Projection, project_query
from core.readout.scores import barrier, prepare, scores
from core.snapshot import Snapshot
from tests.property.worlds import (
    World,
    array,
    branches,
    close,
    directions,
    gaussian,
    learned,
    offsets,
    slots_of,
    worlds,
)
from tests.support import literal
from tests.support.fakes import static_without_shots

TAU = 100.0
SCORE = 1e-4
"""Largest difference between scores of about 100 that float32 explains where beta is moderate."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows of filled slots, one class a row, images, and perhaps offsets."""

    rows: tuple[Tensor, ...]
    x: Tensor
    projection: Projection | None

    def read(self, beta: float, *, rows: tuple[Tensor, ...] | None = None, width: int | None = None) -> Tensor:
        bank = pack(self.rows if rows is None else rows, width=width)
        query = project_query(self.x, self.projection)
        prepared = prepare(bank, self.projection)
        return scores(prepared, barrier(bank.occupied)[:, None, None], self.x, query, beta=beta, tau=TAU)[0]

    def literally(self, beta: float, dtype: type[np.floating] = np.float64, *, relative: bool = False) -> np.ndarray:
        zero = literal.no_offsets(len(self.rows), self.x.shape[1], dtype)
        given_offsets = self.projection
        if given_offsets is not None:
            zero = literal.Offsets(
                **{f.name: array(getattr(given_offsets, f.name), dtype) for f in fields(given_offsets)}
            )
        method = literal.Method(
            text=array(torch.stack([row[0] for row in self.rows]), dtype),
            shots=[[]] * len(self.rows),
            offsets=zero,
            slots=0,
            tau=TAU,
            beta=beta,
            relative=relative,
        )
        banks = [list(array(row, dtype)) for row in self.rows]
        return np.stack([literal.eq_7_to_11(method, banks, image) for image in array(self.x, dtype)])


@st.composite
def cases(draw: st.DrawFn, *, with_offsets: bool | None = None) -> Case:
    """Draw 1 to 5 classes with 1 to 6 filled slots each, all on one side as an encoder's features are.

    Slots that nearly cancel leave a sum without a direction, which no float32 form can tell to the last digits.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5), label="slots")
    dim, images = draw(st.integers(3, 16), label="dim"), draw(st.integers(1, 4), label="images")
    projected = draw(st.booleans()) if with_offsets is None else with_offsets
    common = 1.2 * directions(rng, dim)
    return Case(
        rows=tuple(unit(common + directions(rng, count, dim)) for count in counts),
        x=directions(rng, images, dim),
        projection=offsets(rng, len(counts), dim, 0.3) if projected else None,
    )


@given(cases(), st.sampled_from((0.0, 0.5, 5.5, 30.0)))
def test_the_gram_form_is_the_literal_form(case: Case, beta: float) -> None:
    np.testing.assert_allclose(case.read(beta).numpy(), case.literally(beta), rtol=0, atol=SCORE * (1 + beta / 10))


@given(cases(), st.sampled_from((5.5, 30.0)))
def test_it_is_as_near_the_truth_as_the_literal_form_in_float32(case: Case, beta: float) -> None:
    truth = case.literally(beta)
    error = np.abs(case.read(beta).numpy() - truth).max()
    plain = np.abs(case.literally(beta, np.float32, relative=True) - truth).max()
    assert error <= 8 * plain + 1e-4


@given(cases(), st.sampled_from((300.0, 1e4)))
def test_a_large_sharpness_neither_underflows_nor_loses_its_way(case: Case, beta: float) -> None:
    """A cosine's last bit is worth beta times itself in the exponent; no more than that may be lost."""
    ours = case.read(beta)
    assert torch.isfinite(ours).all()
    np.testing.assert_allclose(ours.numpy(), case.literally(beta, relative=True), rtol=0, atol=SCORE * (1 + beta / 10))


@given(cases(with_offsets=False))
def test_a_large_sharpness_reads_the_nearest_slot(case: Case) -> None:
    read = case.read(1e4)
    for c, row in enumerate(case.rows):
        cosines = (case.x @ row.T).sort(-1, descending=True).values
        clear = torch.ones(len(cosines), dtype=torch.bool)
        if cosines.shape[1] > 1:
            clear = cosines[:, 0] - cosines[:, 1] > 0.01
        close(read[clear, c], TAU * cosines[clear, 0], 1e-3)


@given(cases(with_offsets=False))
def test_a_sharpness_of_zero_reads_the_mean_direction(case: Case) -> None:
    means = torch.stack([torch.nn.functional.normalize(row.double().mean(0), dim=0) for row in case.rows])
    close(case.read(0.0).double(), TAU * case.x.double() @ means.T, SCORE)


@given(cases(with_offsets=False))
def test_zero_offsets_give_the_unprojected_readout(case: Case) -> None:
    zero = replace(case, projection=Projection.zeros(len(case.rows), case.x.shape[1]))
    close(case.read(5.5), zero.read(5.5), SCORE)


@given(cases(), st.randoms(use_true_random=False))
def test_permuting_the_slots_of_a_class_changes_nothing(case: Case, random: object) -> None:
    shuffled = []
    for row in case.rows:
        order = list(range(len(row)))
        random.shuffle(order)  # type: ignore[attr-defined]
        shuffled.append(row[order])
    close(case.read(5.5), case.read(5.5, rows=tuple(shuffled)), SCORE)


@given(cases(), st.integers(0, 9))
def test_appending_empty_slots_changes_nothing(case: Case, more: int) -> None:
    width = max(len(row) for row in case.rows) + more
    close(case.read(5.5), case.read(5.5, width=width), SCORE)


@given(cases(), st.integers(1, 3))
def test_what_lies_in_an_empty_slot_is_never_read(case: Case, more: int) -> None:
    """With offsets an empty slot projects to u(b_k), so the mask must come after the projection."""
    bank = pack(case.rows, width=max(len(row) for row in case.rows) + more)
    keys = bank.keys.clone()
    keys[~bank.occupied] = 7.0
    query = project_query(case.x, case.projection)
    dirty = prepare(replace(bank, keys=keys), case.projection)
    ours = scores(dirty, barrier(bank.occupied)[:, None, None], case.x, query, beta=5.5, tau=TAU)[0]
    close(case.read(5.5), ours, SCORE)


@given(cases(with_offsets=False), st.floats(0.1, 10.0))
def test_without_offsets_the_length_of_a_stored_feature_does_not_matter(case: Case, length: float) -> None:
    close(case.read(5.5), case.read(5.5, rows=tuple(length * row for row in case.rows)), SCORE)


@given(cases())
def test_no_score_leaves_the_range_of_a_scaled_cosine(case: Case) -> None:
    assert (case.read(5.5).abs() <= TAU * (1 + 1e-5)).all()


@given(cases(with_offsets=True))
def test_only_the_mean_of_the_query_offsets_matters_to_a_score(case: Case) -> None:
    assert case.projection is not None
    query = case.projection.query
    mean = query.mean(0, keepdim=True)
    other = replace(case, projection=replace(case.projection, query=mean + 5.0 * (query - mean)))
    close(case.read(5.5), other.read(5.5), 2e-3)


@given(cases(), st.integers(0, 2**32 - 1))
def test_several_masks_are_read_as_each_alone(case: Case, seed: int) -> None:
    bank = pack(case.rows)
    some = bank.occupied & torch.from_numpy(np.random.default_rng(seed).random(bank.occupied.shape) < 0.5)
    some[:, 0] = True
    prepared, query = prepare(bank, case.projection), project_query(case.x, case.projection)
    barriers = barrier(torch.stack((bank.occupied, some), 1))[:, :, None]
    every, fewer = scores(prepared, barriers, case.x, query, beta=5.5, tau=TAU)
    rows = tuple(row[some[c, : len(row)]] for c, row in enumerate(case.rows))
    close(every, case.read(5.5), SCORE)
    close(fewer, case.read(5.5, rows=rows), SCORE)


# --- of a whole snapshot --------------------------------------------------------------------------------------------


@given(worlds(with_offsets=False, read_only=True))
def test_zero_offsets_answer_as_none(world: World) -> None:
    zeros = replace(world.snapshot, projection=Projection.zeros(*world.size))
    plain, written_out = (classify(Shelves(each), world.samples) for each in (world.snapshot, zeros))
    for name, p in branches(plain).items():
        close(p, branches(written_out)[name])
    assert [own.ids for own in plain.memory.classes] == [own.ids for own in written_out.memory.classes]


def _plain(world: World) -> Tensor:
    return torch.stack([sample.views[0] for sample in world.samples])


@given(worlds(with_offsets=False, with_shots=False, images=(1, 8)))
def test_an_empty_memory_without_shots_reads_as_the_text(world: World) -> None:
    x = _plain(world)
    dynamic, static = Shelves(world.snapshot).scores(x)
    assert static is None
    close(dynamic, world.snapshot.tau * x @ world.snapshot.text.T, SCORE)


@given(worlds(with_shots=True, images=(1, 8)))
def test_an_empty_memory_with_shots_reads_as_the_static_one(world: World) -> None:
    dynamic, static = Shelves(world.snapshot).scores(_plain(world))
    assert static is not None
    close(dynamic, static, SCORE)


@given(worlds(with_shots=True, with_offsets=False, images=(1, 8)))
def test_the_static_branch_never_sees_the_dynamic_memory(world: World) -> None:
    before, after = Shelves(world.snapshot), Shelves(learned(world.snapshot, world.samples))
    ours, theirs = before.scores(_plain(world))[1], after.scores(_plain(world))[1]
    assert ours is not None
    assert theirs is not None
    close(ours, theirs, SCORE)


@given(worlds(images=(1, 8)), st.integers(1, 40))
def test_more_room_alone_changes_no_score(world: World, more: int) -> None:
    full = learned(world.snapshot, world.samples)
    wider = replace(full, dynamic=replace(full.dynamic, slots=full.dynamic.slots + more))
    assert torch.equal(Shelves(full).scores(_plain(world))[0], Shelves(wider).scores(_plain(world))[0])


@given(worlds(images=(1, 6)), st.integers(0, 2**32 - 1))
def test_the_last_product_takes_the_unprojected_image(world: World, seed: int) -> None:
    """A class with one slot and no offsets but b_q scores tau m . x whatever the query offset is, Eq. (11)."""
    classes, dim = world.size
    rng = np.random.default_rng(seed)
    text, x = directions(rng, classes, dim), _plain(world)
    query = replace(Projection.zeros(classes, dim), query=gaussian(rng, classes, dim))
    snapshot = replace(
        world.snapshot,
        text=text,
        dynamic=DynamicMemory.empty(classes, dim, 2),
        static=static_without_shots(classes, dim),
        projection=query,
    )
    close(Shelves(snapshot).scores(x)[0], snapshot.tau * x @ text.T, SCORE)


# --- of the shelves -------------------------------------------------------------------------------------------------


@st.composite
def growths(draw: st.DrawFn) -> tuple[World, list[tuple[int, int]]]:
    """Draw a label set and a history: which class holds how many random slots next."""
    world = draw(worlds(images=(1, 3)))
    steps = st.tuples(st.integers(0, world.size[0] - 1), st.integers(0, 40))
    return world, draw(st.lists(steps, min_size=1, max_size=12))


@given(growths(), st.integers(0, 2**32 - 1))
def test_shelves_that_followed_are_shelves_built_anew(grown: tuple[World, list[tuple[int, int]]], seed: int) -> None:
    world, history = grown
    rng, snapshot, x = np.random.default_rng(seed), world.snapshot, _plain(world)
    shelves = Shelves(snapshot)
    for label, count in history:
        classes: list[Slots] = list(snapshot.dynamic.classes)
        classes[label] = slots_of(rng, world.size[1], count)
        patched = shelves.patched([(label, classes[label])], x)[:, 0]
        snapshot = replace(snapshot, dynamic=DynamicMemory(classes=tuple(classes), slots=40))
        shelves.advance(snapshot)
        close(patched, shelves.scores(x)[0][:, label], SCORE * (1 + snapshot.beta / 10))
    anew = Shelves(snapshot)
    for ours, theirs in zip(shelves.scores(x), anew.scores(x), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            close(ours, theirs, SCORE)


@given(growths(), st.integers(0, 2**32 - 1))
def test_padding_stays_small_however_uneven_the_classes(grown: tuple[World, list[tuple[int, int]]], seed: int) -> None:
    """Per filled slot: at most a key and its Gram row at a width three slots (or a sixteenth) wider, rows doubled.

    A small bank, which stands on one shelf, is all as wide as its widest class.
    """
    world, history = grown
    rng, (classes, dim) = np.random.default_rng(seed), world.size
    rows: list[Slots] = [Slots.empty(dim)] * classes
    for label, count in history:
        rows[label] = slots_of(rng, dim, count)
    snapshot = replace(world.snapshot, dynamic=DynamicMemory(classes=tuple(rows), slots=40))
    filled = [snapshot.bank([c])[0].keys.shape[1] for c in range(classes)]
    widths = [max(n + 3, 17 / 16 * n) for n in filled]
    projected, branches_ = snapshot.projection is not None, 2 if snapshot.static.filled else 1
    a_row = [4 * (w * dim + w * w + w * (1 + branches_) + projected * (3 * dim + 2 * w)) for w in widths]
    assert Shelves(snapshot).nbytes <= max(len(a_row), 4) * max(a_row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.prepared_banks._SMALL", 0)
        assert Shelves(snapshot).nbytes <= 4 * sum(a_row) + 4 * 4 * max(a_row)


def test_state_grows_with_the_classes_and_not_with_their_square() -> None:
    """The prediction memory C x L x C of the authors' script is not kept in any guise."""
    small, middle, large = (_bytes(classes) for classes in (16, 32, 64))
    assert middle <= 2 * small
    assert large <= 2 * middle


def _bytes(classes: int, dim: int = 8, slots: int = 7) -> int:
    rng = np.random.default_rng(0)
    rows = tuple(slots_of(rng, dim, slots) for _ in range(classes))
    snapshot = Snapshot(
        text=directions(rng, classes, dim),
        dynamic=DynamicMemory(classes=rows, slots=slots),
        static=static_without_shots(classes, dim),
    )
    return Shelves(snapshot).nbytes
