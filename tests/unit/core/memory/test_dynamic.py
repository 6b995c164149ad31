from __future__ import annotations

import pytest
import torch

from core.memory.bank import SlotId
from core.memory.dynamic import Candidate, DynamicMemory, Outcome, SlotWrite, apply, propose


def _candidate(entropy: float, number: SlotId, *, label: int = 0, value: float = 1.0) -> Candidate:
    return Candidate(label=label, key=torch.tensor([value, 0.0]), entropy=entropy, id=number)


def _memory(*candidates: Candidate, slots: int = 2, dtype: torch.dtype = torch.float32) -> DynamicMemory:
    memory = DynamicMemory.empty(2, 2, slots, dtype=dtype)
    for candidate in candidates:
        memory = apply(memory, propose(memory, candidate))
    return memory


def _decision(write: SlotWrite) -> tuple[Outcome, int | None, SlotId | None]:
    return write.outcome, write.slot, write.evicted


def test_a_new_memory_holds_nothing() -> None:
    memory = DynamicMemory.empty(3, 4, 5, dtype=torch.float16)
    assert [len(own) for own in memory.classes] == [0, 0, 0]
    assert memory.classes[0].keys.dtype == torch.float16
    assert memory.slots == 5


def test_a_free_slot_is_filled_whatever_the_entropy() -> None:
    memory = _memory(_candidate(0.1, 0))
    assert _decision(propose(memory, _candidate(99.0, 1))) == (Outcome.FILLED, 1, None)


def test_a_full_class_gives_its_largest_for_a_smaller_one() -> None:
    memory = _memory(_candidate(0.9, 0), _candidate(0.3, 1))
    write = propose(memory, _candidate(0.5, 2, value=7.0))
    assert _decision(write) == (Outcome.REPLACED, 0, 0)
    after = apply(memory, write).classes[0]
    assert after.ids == (2, 1)
    assert after.entropies == (0.5, 0.3)
    assert after.keys[:, 0].tolist() == [7.0, 1.0]


def test_a_full_class_keeps_out_a_larger_one() -> None:
    memory = _memory(_candidate(0.9, 0), _candidate(0.3, 1))
    write = propose(memory, _candidate(1.0, 2))
    assert _decision(write) == (Outcome.REJECTED, None, None)
    assert apply(memory, write) is memory


def test_of_equal_entropies_the_later_id_stays_out() -> None:
    memory = _memory(_candidate(0.5, 0), _candidate(0.3, 1))
    assert propose(memory, _candidate(0.5, 2)).outcome == Outcome.REJECTED


def test_of_equal_entropies_the_earlier_id_comes_in() -> None:
    memory = _memory(_candidate(0.5, "m"), _candidate(0.3, "n"))
    assert _decision(propose(memory, _candidate(0.5, "a"))) == (Outcome.REPLACED, 0, "m")


def test_of_equal_largest_ones_the_later_id_leaves() -> None:
    memory = _memory(_candidate(0.5, 0), _candidate(0.5, 1))
    assert _decision(propose(memory, _candidate(0.4, 2))) == (Outcome.REPLACED, 1, 1)


def test_a_class_with_no_slots_takes_nothing() -> None:
    memory = _memory(slots=0)
    assert propose(memory, _candidate(0.0, 0)).outcome == Outcome.REJECTED


def test_other_classes_are_the_same_objects_afterwards() -> None:
    memory = _memory(_candidate(0.1, 0, label=1))
    after = apply(memory, propose(memory, _candidate(0.1, 1)))
    assert after.classes[1] is memory.classes[1]
    assert len(memory.classes[0]) == 0


def test_a_repeat_changes_nothing() -> None:
    memory = _memory(_candidate(0.5, "a"))
    write = propose(memory, _candidate(0.5, "a"))
    assert _decision(write) == (Outcome.DUPLICATE, None, None)
    assert apply(memory, write) is memory


def test_a_repeat_of_lower_entropy_takes_its_own_slot() -> None:
    memory = _memory(_candidate(0.5, "a"), _candidate(0.9, "b"))
    write = propose(memory, _candidate(0.4, "a"))
    assert _decision(write) == (Outcome.DUPLICATE, 0, None)
    assert apply(memory, write).classes[0].entropies == (0.4, 0.9)


def test_of_repeats_of_equal_entropy_the_smaller_bytes_stay() -> None:
    small, large = _candidate(0.5, "a", value=1.0), _candidate(0.5, "a", value=1.5)
    assert large.key.numpy().tobytes() > small.key.numpy().tobytes()
    for order in ((small, large), (large, small)):
        assert _memory(*order).classes[0].keys[0, 0].item() == 1.0


def test_repeats_are_compared_as_they_would_be_stored() -> None:
    """In half precision both features are one, so the second changes nothing."""
    memory = _memory(_candidate(0.5, "a", value=1.0), dtype=torch.float16)
    assert propose(memory, _candidate(0.5, "a", value=1.0 - 1e-7)).slot is None


def test_a_key_is_kept_in_the_type_of_the_memory() -> None:
    assert _memory(_candidate(0.5, 0), dtype=torch.float16).classes[0].keys.dtype == torch.float16


@pytest.mark.parametrize("outcome", list(Outcome))
def test_outcomes_are_words_that_metrics_and_answers_share(outcome: Outcome) -> None:
    assert str(outcome) in {"filled", "replaced", "rejected", "duplicate"}
