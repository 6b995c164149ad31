"""One of each in turn."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from service.concurrency.fair_queue import Turns

WAITING = st.lists(st.sampled_from("abc"))


def filled(owners: list[str]) -> Turns[tuple[str, int]]:
    turns: Turns[tuple[str, int]] = Turns()
    for number, owner in enumerate(owners):
        turns.put(owner, (owner, number))
    return turns


@settings(max_examples=100)
@given(WAITING)
def test_nothing_is_lost_and_each_owner_keeps_its_order(owners: list[str]) -> None:
    turns = filled(owners)
    assert len(turns) == len(owners)
    taken = []
    while turns:
        expected = turns.first()
        taken.append(turns.take())
        assert taken[-1] == expected
    assert sorted(number for _, number in taken) == list(range(len(owners)))
    for owner in "abc":
        numbers = [number for own, number in taken if own == owner]
        assert numbers == sorted(numbers)


@settings(max_examples=100)
@given(WAITING)
def test_nobody_gets_two_turns_while_another_waits(owners: list[str]) -> None:
    turns = filled(owners)
    last = None
    while turns:
        others = {own for own, _ in turns} - {last}
        owner, _ = turns.take()
        assert owner != last or not others
        last = owner


def test_what_is_cleared_is_handed_back() -> None:
    turns = filled(["a", "b", "a"])
    assert sorted(turns.clear()) == [("a", 0), ("a", 2), ("b", 1)]
    assert not turns
