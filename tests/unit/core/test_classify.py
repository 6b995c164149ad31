from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from core.classify import CONFIDENT_SHARE, Answers, Sample, classify, confident_mean
from core.memory.dynamic import DynamicMemory, Outcome, SlotWrite
from core.memory.static import Shots, StaticMemory
from core.numerics import unit
from core.prepared_banks import Shelves
from core.readout.projection import Projection
from core.snapshot import Snapshot
from tests.support.fakes import static_without_shots

# --- the worked example: D = 4, C = 3, L = 2, tau = 100, beta = 5.5, one shot a class, one view an image -------------


@dataclass(frozen=True)
class Step:
    """One line of the table: the image before normalisation, and what comes of it."""

    image: tuple[int, int, int, int]
    label: int
    entropy: float
    outcome: Outcome
    slot: int | None
    text: tuple[float, float, float]
    static: tuple[float, float, float]
    dynamic: tuple[float, float, float]


IMAGES = ((12, 10, 10, 9), (13, 10, 9, 10), (11, 10, 10, 10), (14, 9, 10, 9), (14, 9, 10, 9), (10, 12, 10, 10))

ZERO = (
    Step(IMAGES[0], 0, 1.071716, Outcome.FILLED, 0,
         (0.445140, 0.277430, 0.277430), (0.572335, 0.211674, 0.215990), (0.607241, 0.194398, 0.198361)),
    Step(IMAGES[1], 0, 1.017181, Outcome.FILLED, 1,
         (0.526074, 0.264065, 0.209861), (0.760445, 0.137633, 0.101922), (0.787037, 0.122355, 0.090608)),
    Step(IMAGES[2], 0, 1.092045, Outcome.REJECTED, None,
         (0.388026, 0.305987, 0.305987), (0.475374, 0.273351, 0.251275), (0.465660, 0.278412, 0.255928)),
    Step(IMAGES[3], 0, 0.968115, Outcome.REPLACED, 0,
         (0.580587, 0.185931, 0.233482), (0.807153, 0.063002, 0.129846), (0.862573, 0.044897, 0.092531)),
    Step(IMAGES[4], 0, 0.968115, Outcome.REPLACED, 1,
         (0.580587, 0.185931, 0.233482), (0.807153, 0.063002, 0.129846), (0.878058, 0.039837, 0.082104)),
    Step(IMAGES[5], 1, 1.072896, Outcome.FILLED, 0,
         (0.278692, 0.442615, 0.278692), (0.209488, 0.615409, 0.175102), (0.118759, 0.690482, 0.190759)),
)  # fmt: skip

OFFSETS = (
    Step(IMAGES[0], 0, 1.091594, Outcome.FILLED, 0,
         (0.379674, 0.336784, 0.283542), (0.422022, 0.390407, 0.187571), (0.450809, 0.370962, 0.178229)),
    Step(IMAGES[1], 0, 1.072773, Outcome.FILLED, 1,
         (0.426700, 0.331260, 0.242040), (0.565026, 0.306132, 0.128841), (0.597877, 0.283012, 0.119111)),
    Step(IMAGES[2], 1, 1.091771, Outcome.FILLED, 0,
         (0.357896, 0.363013, 0.279091), (0.384674, 0.451593, 0.163733), (0.358900, 0.481000, 0.160100)),
    Step(IMAGES[3], 0, 1.073078, Outcome.REPLACED, 0,
         (0.432282, 0.248637, 0.319080), (0.567809, 0.179104, 0.253088), (0.575955, 0.235628, 0.188417)),
    Step(IMAGES[4], 0, 1.073078, Outcome.REJECTED, None,
         (0.432282, 0.248637, 0.319080), (0.567809, 0.179104, 0.253088), (0.575955, 0.235628, 0.188417)),
    Step(IMAGES[5], 1, 1.033703, Outcome.FILLED, 1,
         (0.303228, 0.494075, 0.202697), (0.197693, 0.740874, 0.061433), (0.163512, 0.759187, 0.077301)),
)  # fmt: skip


def _rows(*rows: tuple[float, ...]) -> Tensor:
    return unit(torch.tensor(rows, dtype=torch.float64)).float()


def _offset(i: int) -> Tensor:
    return torch.tensor([[0.01 * i + 0.02 * c, -0.01 * c, 0.015 * (i - 1), 0.005] for c in range(3)])


def _example(*, projected: bool = False) -> Snapshot:
    shots = _rows((13, 9, 10, 11), (9, 13, 11, 10), (10, 9, 14, 10))
    query, key, value, output, text = (_offset(i) for i in range(5))
    return Snapshot(
        text=_rows((11, 10, 10, 10), (10, 11, 10, 10), (10, 10, 11, 10)),
        dynamic=DynamicMemory.empty(3, 4, 2),
        static=StaticMemory(classes=tuple(Shots(keys=shot[None], ids=(0,)) for shot in shots)),
        projection=Projection(query=query, key=key, value=value, output=output, text=text) if projected else None,
    )


def _sample(image: tuple[float, ...], number: int, *, learn: bool = True) -> Sample:
    return Sample(views=_rows(image), id=number, learn=learn)


def _expect(answers: Answers, row: int, step: Step) -> None:
    write = answers.writes[row]
    assert (write.candidate.label, write.outcome, write.slot) == (step.label, step.outcome, step.slot)
    assert write.candidate.entropy == pytest.approx(step.entropy, abs=5e-6)
    assert answers.static is not None
    assert answers.text[row].tolist() == pytest.approx(step.text, abs=5e-6)
    assert answers.static[row].tolist() == pytest.approx(step.static, abs=1e-5)
    assert answers.dynamic[row].tolist() == pytest.approx(step.dynamic, abs=1e-5)
    mean = [(t + d + s) / 3 for t, d, s in zip(step.text, step.dynamic, step.static, strict=True)]
    assert answers.fused[row].tolist() == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize(("projected", "steps"), [(False, ZERO), (True, OFFSETS)], ids=["zero", "offsets"])
def test_the_worked_example_image_by_image(projected: bool, steps: tuple[Step, ...]) -> None:  # noqa: FBT001 - a case
    snapshot = _example(projected=projected)
    for number, step in enumerate(steps):
        answers = classify(Shelves(snapshot), [_sample(step.image, number)])
        _expect(answers, 0, step)
        snapshot = replace(snapshot, dynamic=answers.memory)


@pytest.mark.parametrize(("projected", "steps"), [(False, ZERO), (True, OFFSETS)], ids=["zero", "offsets"])
def test_the_worked_example_in_one_batch(projected: bool, steps: tuple[Step, ...]) -> None:  # noqa: FBT001 - a case
    samples = [_sample(step.image, number) for number, step in enumerate(steps)]
    answers = classify(Shelves(_example(projected=projected)), samples)
    for row, step in enumerate(steps):
        _expect(answers, row, step)


@pytest.mark.parametrize(("projected", "steps"), [(False, ZERO), (True, OFFSETS)], ids=["zero", "offsets"])
def test_the_worked_example_read_only(projected: bool, steps: tuple[Step, ...]) -> None:  # noqa: FBT001 - a case
    """Each image is first asked about, twice, and then learnt: all three answers are the table's."""
    snapshot = _example(projected=projected)
    for number, step in enumerate(steps):
        asked = [_sample(step.image, number, learn=False)] * 2
        answers = classify(Shelves(snapshot), [*asked, _sample(step.image, number)])
        for row in range(3):
            _expect(answers, row, step)
        snapshot = replace(snapshot, dynamic=answers.memory)


def test_a_further_copy_of_equal_entropy_is_rejected() -> None:
    samples = [_sample(step.image, number) for number, step in enumerate(ZERO)]
    memory = classify(Shelves(_example()), samples).memory
    # All of them again, so that the batch has the same size: entropies may differ in their last bits with it.
    copy = next(number for number, step in enumerate(ZERO) if step.image is IMAGES[4])
    copies = [replace(sample, id=100 + number, learn=number == copy) for number, sample in enumerate(samples)]
    again = classify(Shelves(replace(_example(), dynamic=memory)), copies)
    assert again.writes[copy].outcome == Outcome.REJECTED
    assert again.memory is memory


# --- views ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("views", "keep"), [(1, 1), (2, 1), (9, 1), (10, 1), (19, 1), (20, 2), (32, 3), (64, 6)])
def test_a_tenth_of_the_views_is_kept_and_at_least_one(views: int, keep: int) -> None:
    """View v is surer than view v + 1, and says class 0 with a share that tells them apart."""
    sure = 0.999 - 0.4 * torch.arange(views) / 64
    p = torch.stack((sure, 1 - sure), -1)
    assert confident_mean(p.flip(0))[0].item() == pytest.approx(sure[:keep].mean().item(), abs=1e-6)


def test_the_share_of_kept_views_never_slips_below_the_whole_number() -> None:
    assert [int(CONFIDENT_SHARE * n) for n in range(10, 1001, 10)] == list(range(1, 101))


def test_of_equally_sure_views_the_earlier_one_is_kept() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]])
    assert confident_mean(p).tolist() == pytest.approx([0.9, 0.1])


def test_probabilities_are_averaged_and_not_logits() -> None:
    """The mean of 0.98 and 0.6 is 0.79; that of their logits would be worth 0.90."""
    sure = torch.tensor([[0.98, 0.02], [0.6, 0.4]])
    flat = torch.full((18, 2), 0.5)
    assert confident_mean(torch.cat((flat, sure))).tolist() == pytest.approx([0.79, 0.21])


def test_the_sure_views_give_the_label_and_view_one_gives_the_key_and_the_answer() -> None:
    """View 1 leans to class 0; another view is sure of class 1: the image is stored under 1 with the key of view 1."""
    views = _rows((12, 10, 10, 10), (0, 1, 0, 0))
    snapshot = replace(_example(), static=static_without_shots(3, 4))
    answers = classify(Shelves(snapshot), [Sample(views=views, id=7)])
    assert answers.writes[0].candidate.label == 1
    own = answers.memory.classes[1]
    assert own.ids == (7,)
    assert torch.equal(own.keys, views[:1])
    assert own.entropies[0] < 0.1
    alone = classify(Shelves(snapshot), [Sample(views=views[:1], id=7)])
    assert torch.equal(answers.text, alone.text)
    assert int(alone.text.argmax()) == 0


def test_the_text_offset_changes_labels_and_entropies_too() -> None:
    """Eq. (2) uses the head of (14)."""
    sample, text = _sample((12, 10, 10, 10), 0), torch.zeros(3, 4)
    text[1] = sample.views[0] - _example().text[1]
    swayed = replace(Projection.zeros(3, 4), text=text)
    plain = classify(Shelves(_example()), [sample]).writes[0].candidate
    moved = classify(Shelves(replace(_example(), projection=swayed)), [sample]).writes[0].candidate
    assert plain.label == 0
    assert moved.label == 1
    assert plain.entropy != moved.entropy


# --- the order of a batch -------------------------------------------------------------------------------------------


def test_the_write_comes_before_the_read() -> None:
    """An image alone in an empty memory is read with itself: its class rises above the text's own score."""
    answers = classify(Shelves(replace(_example(), static=static_without_shots(3, 4))), [_sample(IMAGES[0], 0)])
    assert answers.static is None
    assert answers.dynamic[0, 0] > answers.text[0, 0] + 0.03


def test_a_batch_is_read_in_its_order() -> None:
    first, second = _sample(IMAGES[0], 0), _sample(IMAGES[1], 1)
    there, back = (classify(Shelves(_example()), batch) for batch in ([first, second], [second, first]))
    assert there.dynamic[0].tolist() == pytest.approx(list(ZERO[0].dynamic), abs=1e-5)
    assert not torch.allclose(there.dynamic[0], back.dynamic[1], atol=5e-4)


def test_a_reader_in_a_batch_is_not_seen_by_those_behind_it() -> None:
    reader, learner = _sample(IMAGES[1], 0, learn=False), _sample(IMAGES[0], 1)
    answers = classify(Shelves(_example()), [reader, learner])
    assert answers.dynamic[1].tolist() == pytest.approx(list(ZERO[0].dynamic), abs=1e-5)
    assert answers.writes[0].outcome == Outcome.FILLED
    assert answers.memory.classes[0].ids == (1,)
    assert [len(seen.classes[0]) for seen in answers.seen] == [0, 1]


def test_a_reader_sees_what_those_before_it_learnt() -> None:
    learner, reader = _sample(IMAGES[0], 0), _sample(IMAGES[1], 1, learn=False)
    answers = classify(Shelves(_example()), [learner, reader])
    assert answers.dynamic[1].tolist() == pytest.approx(list(ZERO[1].dynamic), abs=1e-5)
    assert answers.memory.classes[0].ids == (0,)


def test_an_image_twice_in_a_batch_is_learnt_once() -> None:
    answers = classify(Shelves(_example()), [_sample(IMAGES[0], 5), _sample(IMAGES[0], 5)])
    assert [write.outcome for write in answers.writes] == [Outcome.FILLED, Outcome.DUPLICATE]
    assert answers.memory.classes[0].ids == (5,)
    torch.testing.assert_close(answers.dynamic[0], answers.dynamic[1])


def test_learned_tells_which_writes_were_made() -> None:
    images = [_sample(step.image, number) for number, step in enumerate(ZERO)]
    batch = [*images, _sample(IMAGES[5], 5), _sample(IMAGES[5], 6, learn=False)]
    learned = classify(Shelves(_example()), batch).learned
    assert learned == (True, True, False, True, True, True, False, False)


def test_who_may_store_is_asked_once_for_each_write_that_would_be_made() -> None:
    asked: list[SlotWrite] = []

    def may_store(write: SlotWrite) -> bool:
        asked.append(write)
        return True

    images = [_sample(step.image, number) for number, step in enumerate(ZERO)]
    answers = classify(Shelves(_example()), [*images, _sample(IMAGES[5], 9, learn=False)], may_store)
    assert asked == [write for write, learned in zip(answers.writes, answers.learned, strict=True) if learned]


def test_a_refused_write_is_read_through_and_not_made() -> None:
    images = [_sample(step.image, number) for number, step in enumerate(ZERO)]
    refused = classify(Shelves(_example()), images[:1], lambda _: False)
    _expect(refused, 0, ZERO[0])
    assert refused.learned == (False,)
    assert [len(own) for own in refused.memory.classes] == [0, 0, 0]
    some = classify(Shelves(_example()), images, lambda write: write.candidate.id != 0)
    assert some.memory.classes[0].ids == (4, 3)
    assert some.learned[0] is False


def test_half_precision_slots_cost_little() -> None:
    narrow = replace(_example(), dynamic=DynamicMemory.empty(3, 4, 2, dtype=torch.float16))
    samples = [_sample(step.image, number) for number, step in enumerate(ZERO)]
    wide, half = (classify(Shelves(snapshot), samples) for snapshot in (_example(), narrow))
    assert half.memory.classes[0].keys.dtype == torch.float16
    assert half.dynamic.dtype == torch.float32
    torch.testing.assert_close(wide.dynamic, half.dynamic, rtol=0, atol=5e-3)


def test_one_class_is_always_right() -> None:
    snapshot = Snapshot(text=_rows((1, 0)), dynamic=DynamicMemory.empty(1, 2, 1), static=static_without_shots(1, 2))
    answers = classify(Shelves(snapshot), [_sample((0, 1), 0)])
    assert answers.fused.tolist() == [[1.0]]
    assert answers.writes[0].candidate.entropy == pytest.approx(0.0, abs=1e-6)


def test_entropy_is_that_of_the_sure_mean_in_nats() -> None:
    snapshot = Snapshot(text=torch.eye(4), dynamic=DynamicMemory.empty(4, 4, 1), static=static_without_shots(4, 4))
    answers = classify(Shelves(snapshot), [_sample((1, 1, 1, 1), 0)])
    assert answers.writes[0].candidate.entropy == pytest.approx(math.log(4), abs=1e-6)
