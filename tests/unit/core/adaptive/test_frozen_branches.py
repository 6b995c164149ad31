from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from core.adaptive import frozen_branches
from core.adaptive.adaptation import Adaptation
from core.adaptive.frozen_branches import Frozen, as_statistics, trust
from core.adaptive.statistics import Statistics
from core.memory.static import Shots, StaticMemory
from tests.support import literal_auto


def _memory(*classes: Tensor) -> StaticMemory:
    return StaticMemory(classes=tuple(Shots(keys=keys, ids=tuple(range(len(keys)))) for keys in classes))


def _unit(v: Tensor) -> Tensor:
    return torch.nn.functional.normalize(v, dim=-1)


def _drawn(numbers: list[int], dim: int = 8, *, seed: int = 0, spread: float = 0.4) -> tuple[Tensor, StaticMemory]:
    """Return class weights near one direction, and shots around them that share another."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(dim, generator=random)
    text = _unit(common + 0.5 * torch.randn(len(numbers), dim, generator=random))
    shift = torch.randn(dim, generator=random)
    shots = [
        _unit(t + 0.2 * shift + spread * torch.randn(n, dim, generator=random))
        for t, n in zip(text, numbers, strict=True)
    ]
    return text, _memory(*shots)


def _trusted(text: Tensor, static: StaticMemory, tau: float = 20.0) -> Frozen:
    return trust(static, as_statistics(static, text), text, tau)


def _rows(static: StaticMemory) -> list[list[np.ndarray]]:
    return [list(shots.keys.double().numpy()) for shots in static.classes]


NUMBERS = {
    "four a class": [4, 4, 4, 4, 4],
    "uneven": [3, 1, 0, 2, 5],
    "one a class": [1, 1, 1, 1, 1],
    "one a class of some": [1, 0, 1, 1, 0],
    "two classes, one each": [1, 1],
    "two classes, four each": [4, 4],
    "twelve a class": [12, 12, 12],
    "thirty of one, one of others": [30, 1, 1, 1],
}


@pytest.mark.parametrize("tau", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("case", NUMBERS)
def test_shots_are_trusted_as_far_as_the_literal_form_does(case: str, tau: float) -> None:
    text, static = _drawn(NUMBERS[case])
    got, rows = _trusted(text, static, tau), _rows(static)
    gamma, sharpness, held_out = literal_auto.trusted(text.double().numpy(), rows, tau)
    assert got.weight == pytest.approx(gamma, rel=1e-3, abs=1e-6)
    assert (got.sharpness, got.held_out) == (sharpness, held_out)
    assert got.shown is not None
    x = _unit(torch.randn(9, 8, generator=torch.Generator().manual_seed(5)) + text[0])
    z0 = np.stack([literal_auto.shown(rows, own) for own in x.double().numpy()])
    np.testing.assert_allclose(got.shown.read(x).numpy(), z0, rtol=0, atol=2e-5)
    log_p = (tau * x @ text.T).double().log_softmax(-1)
    np.testing.assert_allclose(got.scores(log_p, x).numpy(), log_p.numpy() + gamma * z0, rtol=1e-3, atol=1e-3)


def test_shots_worked_by_hand() -> None:
    # Two classes, one shot each: g = (.5, .5), and an image at (1, 0) lies where the first class does.
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    got = _trusted(text, _memory(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])), 10.0)
    assert got.shown is not None
    torch.testing.assert_close(got.shown.centre, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(got.shown.read(torch.tensor([[1.0, 0.0]])), torch.tensor([[1.0, -1.0]]))
    # Both are right: 2 (1 - 2.5 / 3). The other class's text is 5 from the mean, its shot's cosine 1.
    assert got.weight == pytest.approx(5 / 3)
    assert (got.sharpness, got.held_out) == (1.0, 0)


def test_without_shots_the_text_head_stands_alone() -> None:
    text, static = _drawn([0, 0, 0])
    got = _trusted(text, static)
    assert got == Frozen()
    scores = torch.randn(2, 3, dtype=torch.float64)
    assert got.scores(scores, text[:2]) is scores
    assert got.nbytes == 0


def test_a_class_without_shots_is_neither_favoured_nor_ruled_out() -> None:
    text, static = _drawn([2, 0, 2])
    shown = _trusted(text, static).shown
    assert shown is not None
    assert (shown.read(text)[:, 1] == 0).all()


@pytest.mark.parametrize("number", [1, 5])
def test_shots_of_one_class_alone_have_no_weight(number: int) -> None:
    text, static = _drawn([0, number, 0, 0])
    got = _trusted(text, static)
    assert got.weight == 0.0
    assert got.shown is not None
    assert not got.shown.read(text).any()


@pytest.mark.parametrize("number", [1, 2, 4])
def test_shots_that_are_the_same_for_every_class_have_no_weight(number: int) -> None:
    text, _ = _drawn([1] * 4)
    same = text[:1].expand(number, -1)
    assert _trusted(text, _memory(same, same, same, same)).weight == 0.0


def test_duplicates_of_one_shot_a_class_are_finite() -> None:
    text, static = _drawn([1] * 4)
    got = _trusted(text, _memory(*(shots.keys.expand(6, -1) for shots in static.classes)))
    assert got.shown is not None
    assert np.isfinite(got.weight)
    assert torch.isfinite(got.shown.read(text)).all()


def test_one_class_alone_has_nothing_to_tell_apart() -> None:
    for number in (1, 3):
        text, static = _drawn([number])
        got = _trusted(text, static)
        assert (got.weight, got.sharpness, got.held_out) == (0.0, 1.0, 0)


def test_shots_gain_weight_where_the_text_head_is_wrong() -> None:
    text, static = _drawn([1] * 5, spread=0.05)
    turned = StaticMemory(classes=static.classes[1:] + static.classes[:1])
    assert _trusted(text, turned).weight > 3 * _trusted(text, static).weight


def test_half_precision_shots_are_read_in_float32() -> None:
    text, static = _drawn([4, 4, 4])
    half = _memory(*(shots.keys.half() for shots in static.classes))
    ours, theirs = _trusted(text, half), _trusted(text, static)
    assert ours.shown is not None
    assert theirs.shown is not None
    assert ours.shown.directions.dtype == torch.float32
    torch.testing.assert_close(ours.shown.read(text), theirs.shown.read(text), rtol=0, atol=1e-2)


def test_statistics_of_shots_are_those_of_images_whose_class_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    text, static = _drawn([3, 0, 70, 1, 9])
    expected = literal_auto.shots_of(_rows(static), 8)
    for at_once in (1, 4, 1 << 14):
        monkeypatch.setattr(frozen_branches, "_AT_ONCE", at_once)
        got = as_statistics(static, text)
        for name in ("sums", "counts", "total", "second", "images"):
            np.testing.assert_allclose(getattr(got, name).numpy(), getattr(expected, name), rtol=1e-5, atol=1e-5)
        assert not got.agreed.any()


def test_many_shots_are_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_branches, "_CELLS", 64)
    monkeypatch.setattr(frozen_branches, "_FEWEST_ROWS", 10)
    for numbers in ([40] * 8, [1] * 60):
        text, static = _drawn(numbers)
        got = _trusted(text, static)
        assert got.held_out <= 10
        assert 0.0 <= got.weight < 1e3


def test_bytes_are_those_of_its_tensors() -> None:
    text, static = _drawn([2, 2])
    got = _trusted(text, static)
    assert got.nbytes == 4 * (8 + 8 * 8 + 2 * 8 + 2)
    assert isinstance(as_statistics(static, text), Statistics)


def test_shots_of_one_class_alone_do_not_make_statistics_weigh_more() -> None:
    text = torch.eye(3)
    none = Shots(keys=torch.empty(0, 3), ids=())
    alone = StaticMemory(classes=(Shots(keys=text[1:2], ids=("s",)), none, none))
    known = Adaptation.begin(text, alone, 20.0).frozen
    assert (known.weight, known.lean) == (0.0, 1.0)
