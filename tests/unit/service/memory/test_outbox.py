"""Writes that wait for the store: so many at most, each slot once, and none beyond its epoch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.domain.memory import StoredSlot
from service.memory.outbox import Outbox
from service.stores.protocol import PushCandidate


def write(id_: str, entropy: float = 0.5, feature: bytes = b"a", class_: str = "cats") -> PushCandidate:
    return PushCandidate(class_id=class_, slot=StoredSlot(id=id_, entropy=entropy, feature=feature))


@pytest.fixture
def outbox() -> Outbox:
    return Outbox(room=3)


def test_what_waits_is_taken_once_in_the_order_of_its_coming(outbox: Outbox) -> None:
    writes = [write("2"), write("1", 0.9), write("3", 0.1)]
    assert all(outbox.add("zoo", 7, one) for one in writes)
    assert len(outbox) == 3
    assert outbox.take("zoo") == (7, writes)
    assert (len(outbox), outbox.tenants, "zoo" in outbox) == (0, [], False)
    assert not outbox.take("zoo")[1]


def test_an_empty_one_has_nobody_and_nothing(outbox: Outbox) -> None:
    assert (len(outbox), outbox.tenants, "zoo" in outbox) == (0, [], False)
    assert not outbox.take("zoo")[1]


def test_tenants_have_their_own(outbox: Outbox) -> None:
    outbox.add("zoo", 1, write("1"))
    outbox.add("farm", 9, write("1", 0.1))
    assert outbox.tenants == ["zoo", "farm"]
    assert outbox.take("zoo") == (1, [write("1")])
    assert outbox.take("farm") == (9, [write("1", 0.1)])


def test_there_is_room_for_so_many_of_all_tenants_together(outbox: Outbox) -> None:
    for tenant in ("a", "b", "c"):
        assert outbox.add(tenant, 1, write("1"))
    assert not outbox.add("a", 1, write("2"))
    assert not outbox.add("d", 1, write("1"))
    assert len(outbox) == 3
    assert "d" not in outbox
    outbox.take("b")
    assert outbox.add("d", 1, write("1"))


def test_a_slot_that_waits_already_needs_no_room(outbox: Outbox) -> None:
    for id_ in "123":
        outbox.add("zoo", 1, write(id_))
    assert outbox.add("zoo", 1, write("2", 0.1))
    assert outbox.take("zoo")[1] == [write("1"), write("2", 0.1), write("3")]


def test_without_room_nothing_waits() -> None:
    outbox = Outbox(room=0)
    assert not outbox.add("zoo", 1, write("1"))
    assert outbox.tenants == []


def test_one_id_in_two_classes_is_two_slots(outbox: Outbox) -> None:
    outbox.add("zoo", 1, write("1", class_="cats"))
    outbox.add("zoo", 1, write("1", class_="dogs"))
    assert len(outbox) == 2


SAMPLES = st.tuples(
    st.sampled_from("12"), st.sampled_from((0.1, 0.2)), st.sampled_from((b"a", b"b")), st.sampled_from(("cats", "dogs"))
)


@settings(max_examples=100)
@given(st.lists(SAMPLES, max_size=12))
def test_of_one_slot_the_lower_entropy_and_then_the_lower_feature_waits(
    samples: list[tuple[str, float, bytes, str]],
) -> None:
    outbox = Outbox(room=100)
    least: dict[tuple[str, str], tuple[float, bytes]] = {}
    for id_, entropy, feature, class_ in samples:
        assert outbox.add("zoo", 1, write(id_, entropy, feature, class_))
        place = class_, id_
        least[place] = min(least.get(place, (entropy, feature)), (entropy, feature))
    _, waiting = outbox.take("zoo")
    assert {(one.class_id, one.slot.id): (one.slot.entropy, one.slot.feature) for one in waiting} == least
    assert len(waiting) == len(least)


def test_writes_of_two_epochs_never_wait_together(outbox: Outbox) -> None:
    """What was reset since must not be learned again."""
    outbox.add("zoo", 1, write("1"))
    outbox.add("zoo", 2, write("2"))
    assert outbox.take("zoo") == (2, [write("2")])
    assert len(outbox) == 0
