"""Orders of a stream: who is in them, in which company, and that a seed fixes them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.errors import InvalidStream
from core.evaluation.stream_orders import (
    BLOCKS,
    KINDS,
    RUN,
    Kind,
    blocks_along,
    drift,
    iid,
    mixed,
    order_of,
    runs,
    zipf,
)

SEEDS = st.integers(0, 2**16)
LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(torch.tensor)
TEXT = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


def lengths(labels: Tensor) -> list[int]:
    """Return the lengths of the runs of one class."""
    return [len(list(run)) for _, run in itertools.groupby(labels.tolist())]


@given(LABELS, SEEDS, st.sampled_from(KINDS))
def test_an_order_takes_no_image_twice_and_is_the_same_for_the_same_seed(labels: Tensor, seed: int, kind: Kind) -> None:
    order = order_of(kind, seed, n=len(labels), labels=labels, text=TEXT)
    assert len(set(order.tolist())) == len(order)
    assert set(order.tolist()) <= set(range(len(labels)))
    if kind != "zipf":
        assert len(order) == len(labels)
    assert order.equal(order_of(kind, seed, n=len(labels), labels=labels, text=TEXT))


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_gives_another_order(kind: Kind) -> None:
    labels = torch.arange(7).repeat(40)
    first, second = (order_of(kind, seed, n=280, labels=labels, text=TEXT) for seed in (0, 1))
    assert first.tolist() != second.tolist()


def test_a_shuffled_order_is_the_permutation_that_numpy_draws() -> None:
    assert iid(100, 7).tolist() == np.random.default_rng(7).permutation(100).tolist()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "iid"])
def test_an_order_made_by_labels_says_so_where_there_are_none(kind: Kind) -> None:
    with pytest.raises(InvalidStream, match="labels"):
        order_of(kind, 0, n=3, labels=None, text=TEXT)
    assert len(order_of("iid", 0, n=3, labels=None, text=TEXT)) == 3


@pytest.mark.parametrize("classes", [2, 20])
def test_runs_have_the_mean_length_that_they_are_named_for(classes: int) -> None:
    """Of classes far larger than a run, so that hardly one is cut short; two runs of one class would be one."""
    labels = torch.arange(classes).repeat(40_000 // classes)
    told = lengths(labels[runs(labels, 0)])
    assert np.mean(told) == pytest.approx(RUN, rel=0.1)
    assert np.std(told) == pytest.approx(RUN, rel=0.15)  # of a geometric distribution, almost its mean


def test_a_class_that_is_left_alone_at_the_end_still_has_its_images() -> None:
    labels = torch.tensor([0] * 3 + [1] * 500)
    assert sorted(runs(labels, 0).tolist()) == list(range(503))


@pytest.mark.parametrize("seed", range(5))
def test_zipf_keeps_of_each_class_in_inverse_proportion_to_its_rank(seed: int) -> None:
    labels = torch.arange(8).repeat_interleave(840)
    counts = torch.bincount(labels[zipf(labels, seed)]).sort(descending=True).values
    assert counts.tolist() == [round(840 / rank) for rank in range(1, 9)]


def test_the_seed_draws_which_class_is_frequent() -> None:
    labels = torch.arange(8).repeat(40)
    first = {int(torch.bincount(labels[zipf(labels, seed)]).argmax()) for seed in range(20)}
    assert len(first) > 3


@given(LABELS, SEEDS)
def test_zipf_loses_no_class_and_ranks_none_above_its_images(labels: Tensor, seed: int) -> None:
    kept = labels[zipf(labels, seed)]
    assert set(kept.tolist()) == set(labels.tolist())
    assert (torch.bincount(kept, minlength=7) <= torch.bincount(labels, minlength=7)).all()


def test_zipf_is_shuffled() -> None:
    labels = torch.arange(4).repeat(100)
    assert len(lengths(labels[zipf(labels, 0)])) > 50


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor), SEEDS)
def test_a_drift_goes_block_after_block(blocks: Tensor, seed: int) -> None:
    seen = blocks[drift(blocks, seed)]
    assert seen.equal(seen.sort().values)


def test_a_drift_is_shuffled_inside_its_blocks() -> None:
    order = drift(torch.zeros(50, dtype=torch.long), 3)
    assert order.tolist() != sorted(order.tolist())


def test_blocks_follow_the_first_principal_component_of_the_text() -> None:
    """Twenty classes along one line, seen from far off it: two a block, from the end that the line's sign says."""
    along, off = torch.eye(6)[2], 5 * torch.eye(6)[4]
    places = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    text = places[:, None] * along + off
    assert blocks_along(text).tolist() == (places // 2).tolist()
    assert blocks_along(text @ torch.diag(torch.tensor([1.0, 1, -1, 1, 1, 1]))).tolist() == (9 - places // 2).tolist()


@pytest.mark.parametrize("classes", [1, 2, 9, 11, 25])
def test_blocks_are_of_almost_equal_size(classes: int) -> None:
    counts = torch.bincount(blocks_along(torch.randn(classes, 12)), minlength=BLOCKS)
    assert counts.max() - counts.min() <= 1


@given(st.permutations(range(12)), st.integers(0, 9), SEEDS)
def test_mixing_others_in_changes_the_order_of_neither(order: list[int], others: int, seed: int) -> None:
    more = torch.arange(12, 12 + others)
    both = mixed(torch.tensor(order), more, seed)
    assert both[both < 12].tolist() == order
    assert both[both >= 12].equal(more)


def test_others_are_mixed_in_everywhere() -> None:
    both = mixed(torch.arange(1000), torch.arange(1000, 2000), 0)
    assert (both[:1000] >= 1000).double().mean().item() == pytest.approx(0.5, abs=0.05)
