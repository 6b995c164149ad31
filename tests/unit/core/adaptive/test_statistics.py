from __future__ import annotations

import random
from dataclasses import fields

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.adaptive.statistics import LOOSE, TEMPERATURES, Counted, Running, Statistics
from tests.support import literal_auto


def _some(n: int, classes: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n, dim, generator=random), dim=-1)
    shares = torch.randn(n, classes, generator=random).softmax(-1)
    return x, shares, torch.rand(n, TEMPERATURES, generator=random), torch.rand(n, generator=random)


def _rows(n: int, classes: int, dim: int, seed: int = 0) -> Counted:
    x, shares, agreed, sure = _some(n, classes, dim, seed)
    return Counted(x=x, responsibilities=shares, agreed=agreed, sure=sure)


def _part(rows: Counted, numbers: Tensor) -> Counted:
    return Counted(**{field.name: getattr(rows, field.name)[numbers] for field in fields(Counted)})


def _sums(rows: Counted) -> Statistics:
    return rows.added_to(Statistics.zeros(rows.responsibilities.shape[1], rows.x.shape[1]))


def _assert_close(one: Statistics, other: Statistics) -> None:
    for field in fields(Statistics):
        torch.testing.assert_close(getattr(one, field.name), getattr(other, field.name), rtol=1e-5, atol=1e-5)


def test_sums_worked_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    shares = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    sure = torch.tensor([0.5, 0.25])
    got = _sums(Counted(x=x, responsibilities=shares, agreed=torch.ones(2, TEMPERATURES), sure=sure))
    torch.testing.assert_close(got.sums, torch.tensor([[1.15, 0.2], [0.45, 0.6]]))
    torch.testing.assert_close(got.counts, torch.tensor([1.25, 0.75]))
    torch.testing.assert_close(got.total, torch.tensor([1.6, 0.8]))
    torch.testing.assert_close(got.second, torch.tensor([[1.36, 0.48], [0.48, 0.64]]))
    assert (got.images.item(), got.sure.item()) == (2.0, 0.75)
    assert torch.equal(got.agreed, torch.full((TEMPERATURES,), 2.0))


def test_sums_are_the_literal_ones() -> None:
    rows = _rows(40, 5, 7)
    got, expected = _sums(rows), literal_auto.Sums.none(5, 7)
    for image, own in zip(rows.x.double().numpy(), rows.responsibilities.double().numpy(), strict=True):
        expected.add(image, own)
    for name in ("sums", "counts", "total", "second", "images"):
        np.testing.assert_allclose(getattr(got, name).numpy(), getattr(expected, name), rtol=1e-5, atol=1e-5)


def test_parts_add_up_to_the_whole_in_any_order() -> None:
    rows = _rows(30, 4, 6)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    for numbers in ([order], order.split(7), order.split(1)):
        together = Statistics.zeros(4, 6)
        for some in numbers:
            together = together + _sums(_part(rows, some))
        _assert_close(together, _sums(rows))


@given(st.lists(st.integers(1, 2 * LOOSE), max_size=8), st.randoms(use_true_random=False))
def test_loose_and_added_rows_give_the_same_sums_however_they_are_grouped(
    sizes: list[int], shuffle: random.Random
) -> None:
    rows = _rows(sum(sizes), 3, 5)
    before = _sums(_rows(7, 3, 5, seed=1))
    running, order = Running.of(before), list(range(len(rows)))
    shuffle.shuffle(order)
    for some in torch.tensor(order, dtype=torch.long).split(sizes):
        running = running.put(_part(rows, some))
        assert sum(map(len, running.loose)) < LOOSE
    assert running.images == running.whole.images == 7 + len(rows)
    _assert_close(running.whole, before + _sums(rows))
    assert not running.settled().loose


def test_who_holds_a_running_total_keeps_what_it_was() -> None:
    held = [Running.of(Statistics.zeros(2, 4))]
    seen = [held[0].whole]
    copies = [_copy(seen[0])]
    for seed in range(2 * LOOSE):
        held.append(held[-1].put(_rows(1, 2, 4, seed)))
        seen.append(held[-1].whole)
        copies.append(_copy(seen[-1]))
    for running, whole, copy in zip(held, seen, copies, strict=True):
        assert running.images == whole.images == copy.images
        for field in fields(Statistics):
            assert torch.equal(getattr(running.whole, field.name), getattr(copy, field.name))
            assert torch.equal(getattr(whole, field.name), getattr(copy, field.name))


def _copy(statistics: Statistics) -> Statistics:
    return Statistics(**{field.name: getattr(statistics, field.name).clone() for field in fields(Statistics)})


def test_a_running_total_counts_as_many_bytes_as_it_may_hold_before_it_adds_up() -> None:
    running = Running.of(Statistics.zeros(3, 5))
    bytes_before = running.nbytes
    running = running.put(_rows(LOOSE - 1, 3, 5))
    held = sum(getattr(row, field.name).nbytes for row in running.loose for field in fields(Counted))
    assert running.nbytes == bytes_before == running.added.nbytes + held


def test_nothing_is_counted_of_no_image() -> None:
    none = Statistics.zeros(4, 6)
    for field in fields(Statistics):
        assert not getattr(none, field.name).any()
        assert getattr(none, field.name).dtype == torch.float32
    assert none.nbytes == 4 * (4 * 6 + 4 + 6 + 6 * 6 + 1 + TEMPERATURES + 1)


def test_adding_leaves_both_alone() -> None:
    one, other = _sums(_rows(3, 2, 4)), _sums(_rows(3, 2, 4, seed=1))
    before = one.sums.clone(), other.sums.clone()
    assert not torch.equal((one + other).sums, one.sums)
    assert torch.equal(one.sums, before[0])
    assert torch.equal(other.sums, before[1])
