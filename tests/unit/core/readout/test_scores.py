from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from core.memory.bank import pack
from core.readout.projection import Projection, project_query
from core.readout.scores import barrier, prepare, scores

NAMES = ("query", "key", "value", "output", "text")
SQRT_HALF = math.sqrt(0.5)
EAST, NORTH = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def _read(rows: list[Tensor], x: Tensor, beta: float, tau: float = 10.0, offsets: Projection | None = None) -> Tensor:
    bank = pack(rows)
    query = project_query(x, offsets)
    return scores(prepare(bank, offsets), barrier(bank.occupied)[:, None, None], x, query, beta=beta, tau=tau)[0]


def test_one_slot_scores_its_scaled_cosine() -> None:
    got = _read([torch.stack([EAST]), torch.stack([NORTH])], torch.tensor([[0.6, 0.8]]), 5.5)
    torch.testing.assert_close(got, torch.tensor([[6.0, 8.0]]))


def test_two_slots_by_hand() -> None:
    """Weights e^-0 and e^-beta on two right-angled slots, seen from the first: f = (1, w) / |(1, w)|."""
    weight = math.exp(-2.0)
    got = _read([torch.stack([EAST, NORTH])], EAST[None], 2.0)
    assert got.item() == pytest.approx(10.0 / math.hypot(1.0, weight), abs=1e-5)


def test_without_sharpness_two_slots_are_their_mean_direction() -> None:
    assert _read([torch.stack([EAST, NORTH])], EAST[None], 0.0).item() == pytest.approx(10 * SQRT_HALF, abs=1e-5)


@pytest.mark.parametrize("beta", [1e4, 1e6, 1e38, math.inf])
def test_endless_sharpness_reads_the_nearest_slot(beta: float) -> None:
    far = torch.tensor([[0.6, 0.8], [-0.6, 0.8]])
    assert _read([far], EAST[None], beta).item() == pytest.approx(6.0, abs=1e-5)


def test_an_output_offset_turns_the_class_weights() -> None:
    """With f = u(u(a) + b_o), a = east and b_o = north: halfway between."""
    offsets = Projection.zeros(1, 2)
    turned = Projection(
        query=offsets.query, key=offsets.key, value=offsets.value, output=NORTH[None], text=offsets.text
    )
    got = _read([torch.stack([EAST])], torch.tensor([[0.0, 1.0]]), 5.5, offsets=turned)
    assert got.item() == pytest.approx(10 * SQRT_HALF, abs=1e-5)


def test_a_value_offset_moves_what_is_read_and_not_what_is_matched() -> None:
    offsets = Projection.zeros(1, 2)
    moved = Projection(
        query=offsets.query, key=offsets.key, value=NORTH[None], output=offsets.output, text=offsets.text
    )
    got = _read([torch.stack([EAST])], EAST[None], 5.5, offsets=moved)
    assert got.item() == pytest.approx(10 * SQRT_HALF, abs=1e-5)


def test_a_key_offset_moves_what_is_matched_and_not_what_is_read() -> None:
    """b_k = 3 north pulls both keys north, but the sums still run over east and north themselves."""
    offsets = Projection.zeros(1, 2)
    moved = Projection(
        query=offsets.query, key=3 * NORTH[None], value=offsets.value, output=offsets.output, text=offsets.text
    )
    near, far = 1 / math.sqrt(10), 0.0  # cosines of u(1, 3) and u(0, 4) with east
    weight = math.exp(-2.0 * (near - far))
    got = _read([torch.stack([EAST, NORTH])], EAST[None], 2.0, offsets=moved)
    assert got.item() == pytest.approx(10.0 / math.hypot(1.0, weight), abs=1e-5)


def test_a_query_offset_moves_the_match_and_not_the_last_product() -> None:
    """The query u(east + north) sees both slots alike, so f is their mean; the score is taken with east itself."""
    offsets = Projection.zeros(1, 2)
    moved = Projection(
        query=NORTH[None], key=offsets.key, value=offsets.value, output=offsets.output, text=offsets.text
    )
    got = _read([torch.stack([EAST, NORTH])], EAST[None], 50.0, offsets=moved)
    assert got.item() == pytest.approx(10 * SQRT_HALF, abs=1e-4)


def test_without_offsets_nothing_is_made_of_a_slot_but_its_length_and_its_products() -> None:
    bank = pack([torch.stack([3.0 * EAST, NORTH])])
    ready = prepare(bank)
    assert ready.slots is bank.keys
    assert ready.turned is None
    torch.testing.assert_close(ready.scale, torch.tensor([[1 / 3, 1.0]]))
    torch.testing.assert_close(ready.gram, torch.eye(2)[None])


def test_offsets_are_worked_into_the_products() -> None:
    """Values u(east + 0.75 north) and u(1.75 north), seen from b_o = (0.5, 1)."""
    zeros = Projection.zeros(1, 2)
    given = Projection(
        query=zeros.query,
        key=2.0 * EAST[None],
        value=0.75 * NORTH[None],
        output=torch.tensor([[0.5, 1.0]]),
        text=zeros.text,
    )
    bank = pack([torch.stack([EAST, NORTH])])
    ready = prepare(bank, given)
    assert ready.slots is bank.keys
    assert ready.turned is not None
    torch.testing.assert_close(ready.scale, torch.tensor([[1 / 3, 5**-0.5]]))
    torch.testing.assert_close(ready.turned.value_scale, torch.tensor([[0.8, 1 / 1.75]]))
    torch.testing.assert_close(ready.turned.onto_output, torch.tensor([[0.8 * 0.5 + 0.6, 1.0]]))
    torch.testing.assert_close(ready.gram, torch.tensor([[[1.0, 0.6], [0.6, 1.0]]]))


def test_one_call_reads_several_masks() -> None:
    bank = pack([torch.stack([EAST, NORTH])])
    masks = torch.tensor([[[True, False], [False, True]]])
    first, second = scores(prepare(bank), barrier(masks)[:, :, None], EAST[None], EAST[None], beta=5.5, tau=10.0)
    assert first.item() == pytest.approx(10.0, abs=1e-5)
    assert second.item() == pytest.approx(0.0, abs=1e-5)


def test_a_mask_may_be_another_for_each_image() -> None:
    bank = pack([torch.stack([EAST, NORTH])])
    masks, x = torch.tensor([[[[True, False], [False, True]]]]), EAST.expand(2, -1)
    assert scores(prepare(bank), barrier(masks), x, x, beta=5.5, tau=10.0)[0, :, 0].tolist() == pytest.approx(
        [10.0, 0.0]
    )


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("images", [1, 2, 3, 4, 33])
def test_classes_read_some_at_a_time_and_in_any_form_score_as_all_at_once(
    images: int,
    projected: bool,  # noqa: FBT001 - a case
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = torch.Generator().manual_seed(0)
    bank = pack([torch.nn.functional.normalize(torch.randn(1 + c % 3, 8, generator=random), dim=-1) for c in range(23)])
    offsets = (
        Projection(**dict(zip(NAMES, 0.2 * torch.randn(5, 23, 8, generator=random), strict=True)))
        if projected
        else None
    )
    x = torch.nn.functional.normalize(torch.randn(images, 8, generator=random), dim=-1)
    prepared, barriers = prepare(bank, offsets), barrier(bank.occupied)[:, None, None]

    def read() -> Tensor:
        return scores(prepared, barriers, x, project_query(x, offsets), beta=5.5, tau=100.0)

    whole = read()
    monkeypatch.setattr("core.readout.scores._AT_ONCE", 100)
    torch.testing.assert_close(read(), whole, rtol=0, atol=1e-4)
    one = torch.cat(
        [scores(prepared, barriers, y[None], project_query(y[None], offsets), beta=5.5, tau=100.0)[0] for y in x]
    )
    torch.testing.assert_close(one, whole[0], rtol=0, atol=1e-4)


def test_slots_that_cancel_give_a_finite_score() -> None:
    got = _read([torch.stack([NORTH, -NORTH])], EAST[None], 5.5)
    assert torch.isfinite(got).all()


def _after_insert(stored: int) -> tuple[float, float]:
    """Return a class's score before and after the query itself is stored: cosines 0.8, own text 0.3, text 0.28."""
    size = stored + 2
    gram = torch.full((size, size), 0.80, dtype=torch.float64)
    gram[0, :] = gram[:, 0] = 0.28
    gram[0, -1] = gram[-1, 0] = 0.30
    gram.fill_diagonal_(1.0)
    features = torch.linalg.cholesky(gram).float()
    text, entries, x = features[:1], features[1:-1], features[-1:]
    before = torch.cat((text, entries))
    return tuple(_read([row], x, 5.5, 100.0).item() for row in (before, torch.cat((before, x))))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("stored", "before", "after"),
    [(0, 30.0, 99.98), (1, 80.3, 98.8), (2, 84.5, 97.6), (5, 87.3, 95.3), (10, 88.4, 93.3), (20, 88.9, 91.7),
     (49, 89.2, 90.5)],
)  # fmt: skip
def test_the_first_slot_lifts_a_class_by_tens_of_logits(stored: int, before: float, after: float) -> None:
    """Why the write comes before the read: a class with an empty bank cannot win without its own insert."""
    assert _after_insert(stored) == (pytest.approx(before, abs=0.06), pytest.approx(after, abs=0.06))
