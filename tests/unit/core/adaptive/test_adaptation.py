from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from core.adaptive.adaptation import FULL, Adaptation, Adapted, adapt, temperature
from core.adaptive.statistics import LOOSE, TEMPERATURES, Counted, Statistics
from core.memory.static import Shots, StaticMemory
from tests.support import literal_auto
from tests.support.fakes import static_without_shots


def _unit(v: Tensor) -> Tensor:
    return torch.nn.functional.normalize(v, dim=-1)


def _memory(*classes: Tensor) -> StaticMemory:
    return StaticMemory(classes=tuple(Shots(keys=keys, ids=tuple(range(len(keys)))) for keys in classes))


def _world(classes: int, dim: int, shots: int, images: int, *, seed: int = 0) -> tuple[Tensor, StaticMemory, Tensor]:
    """Return class weights near one direction, shots and images around another near it."""
    random = torch.Generator().manual_seed(seed)

    def near(centre: Tensor, *size: int) -> Tensor:
        return _unit(centre + 0.4 * torch.randn(*size, dim, generator=random) / dim**0.5)

    common = torch.randn(dim, generator=random)
    common = common / common.norm()
    text = near(common, classes)
    shifted = _unit(text + 0.2 * near(common))
    return text, _memory(*(near(t, shots) for t in shifted)), near(shifted[torch.arange(images) % classes], images)


def _scored(adaptation: Adaptation, x: Tensor, count: list[bool] | None = None) -> Adapted:
    text = (adaptation.tau * x @ adaptation.text.T).double().log_softmax(-1)
    scores = adaptation.frozen.scores(text, x).float()
    return adapt(adaptation, x, text.float(), scores, [True] * len(x) if count is None else count)


def _literal(adaptation: Adaptation, static: StaticMemory) -> literal_auto.Auto:
    classes, dim = adaptation.text.shape
    return literal_auto.Auto(
        text=adaptation.text.double().numpy(),
        shots=[list(shots.keys.double().numpy()) for shots in static.classes],
        tau=adaptation.tau,
        gamma=adaptation.frozen.weight,
        lean=adaptation.frozen.lean,
        sharpness=adaptation.frozen.sharpness,
        held_out=adaptation.frozen.held_out,
        traffic=literal_auto.Sums.none(classes, dim),
    )


@pytest.mark.parametrize("shots", [0, 1, 3])
@pytest.mark.parametrize(("classes", "dim"), [(1, 6), (2, 6), (5, 12), (7, 4)])
def test_a_stream_gets_the_literal_answers_and_sums(classes: int, dim: int, shots: int) -> None:
    text, static, x = _world(classes, dim, shots, 100)
    adaptation = Adaptation.begin(text, static, 30.0)
    plain = _literal(adaptation, static)
    count = [number % 5 != 3 for number in range(len(x))]
    got = _scored(adaptation, x, count)
    for row, image in enumerate(x.double().numpy()):
        statistics, fused = plain.step(image, count=count[row])
        np.testing.assert_allclose(got.statistics[row].numpy(), statistics, rtol=0, atol=1e-4)
        np.testing.assert_allclose(got.fused[row].numpy(), fused, rtol=0, atol=1e-4)
    sums = got.adaptation.statistics
    for field in fields(Statistics):
        expected = getattr(plain.traffic, field.name)
        np.testing.assert_allclose(getattr(sums, field.name).numpy(), expected, rtol=1e-4, atol=1e-4)
    assert got.adaptation.made_at == plain.made_at == 64
    assert got.adaptation.directions.weight == pytest.approx(plain.made.w)
    assert got.adaptation.directions.temperature == pytest.approx(plain.made.temperature, abs=1e-3)


def test_directions_worked_by_hand() -> None:
    # Two classes in the plane; after one image of each, counted as such, g = (.5, .5) and A = (.5, -.5) + (.25, -.25).
    text = torch.eye(2)
    seen = replace(Statistics.zeros(2, 2), sums=torch.eye(2), counts=torch.ones(2), total=torch.ones(2))
    seen = replace(seen, second=torch.eye(2), images=torch.tensor(2.0))
    made = Adaptation.begin(text, static_without_shots(2, 2), 10.0, seen).directions
    torch.testing.assert_close(made.centre, torch.tensor([0.5, 0.5]))
    # The images are their classes' means: no spread, a round space.
    torch.testing.assert_close(made.precision, torch.eye(2))
    torch.testing.assert_close(made.directions, torch.tensor([[0.75, -0.75], [-0.75, 0.75]]))
    torch.testing.assert_close(made.squares, torch.tensor([1.125, 1.125]))
    assert made.weight == pytest.approx(10 * 2 / 82)


def test_before_any_image_the_answer_is_the_text_heads() -> None:
    text, static, x = _world(5, 8, 0, 6)
    got = _scored(Adaptation.begin(text, static, 100.0), x, [False] * 6)
    torch.testing.assert_close(got.fused, (100 * x @ text.T).softmax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("agreed", "sure", "expected"),
    [
        ([1.0 - k / 16 for k in range(17)], 0.5, 0.0),  # agreement falls to a half at the middle step
        ([1.0 - k / 16 for k in range(17)], 0.46775, 0.125),  # to a thousandth above it between two steps
        ([1.0 - k / 16 for k in range(17)], 0.53225, -0.125),  # to a thousandth below it
        ([1.0] * 17, 0.5, 2.0),  # nothing is soft enough
        ([0.2] * 17, 0.5, -2.0),  # nothing is sharp enough
        ([0.5] * 17, 0.5, 0.0),  # everything is as it should be
        ([0.5 + 1e-7] * 4 + [0.5 - 1e-7] * 13, 0.5, 0.0),  # everything is, but for rounding
        ([0.501] * 6 + [0.301] * 11, 0.5, -0.7475),  # what is agreed nearest to 0 is at a fall
    ],
)
def test_temperatures_worked_by_hand(agreed: list[float], sure: float, expected: float) -> None:
    seen = replace(Statistics.zeros(2, 2), agreed=96 * torch.tensor(agreed), sure=torch.tensor(96 * sure))
    seen = replace(seen, images=torch.tensor(96.0))
    assert temperature(seen) == pytest.approx(expected * 96 / 128, abs=1e-5)
    literally = literal_auto.Sums(
        np.zeros((2, 2)), np.zeros(2), np.zeros(2), np.zeros((2, 2)), 96, [96 * a for a in agreed], 96 * sure
    )
    assert temperature(seen) == pytest.approx(literal_auto.eq_22(literally), abs=1e-5)


def test_no_image_has_no_temperature() -> None:
    assert temperature(Statistics.zeros(3, 4)) == 0.0


def test_directions_are_made_anew_at_doublings_and_then_every_32_images_and_then_every_32nd() -> None:
    text, static, x = _world(2, 4, 0, 300)
    adaptation, at = Adaptation.begin(text, static, 50.0), []
    for image in x:
        before, adaptation = adaptation, _scored(adaptation, image[None]).adaptation
        if adaptation.directions is not before.directions:
            at.append(adaptation.made_at)
    assert at == [1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 288]
    many = replace(adaptation, made_at=6400)
    assert many.known(replace(adaptation.statistics, images=torch.tensor(6599.0))).made_at == 6400
    assert many.known(replace(adaptation.statistics, images=torch.tensor(6600.0))).made_at == 6600


def test_fewer_images_than_before_make_the_directions_anew() -> None:
    text, static, x = _world(3, 6, 0, 40)
    grown = _scored(Adaptation.begin(text, static, 50.0), x).adaptation
    again = grown.known(Statistics.zeros(3, 6))
    assert again.made_at == 0
    assert torch.equal(again.directions.directions, Adaptation.begin(text, static, 50.0).directions.directions)


def test_an_adaptation_begins_with_what_was_counted_before() -> None:
    text, static, x = _world(4, 6, 2, 64)
    grown = _scored(Adaptation.begin(text, static, 50.0), x).adaptation
    again = Adaptation.begin(text, static, 50.0, grown.statistics)
    assert again.made_at == grown.made_at == 64
    assert torch.equal(again.directions.directions, grown.directions.directions)
    assert again.directions.temperature == grown.directions.temperature


def test_images_that_do_not_count_leave_the_very_adaptation() -> None:
    text, static, x = _world(3, 6, 1, 20)
    adaptation = Adaptation.begin(text, static, 50.0)
    got = _scored(adaptation, x, [False] * 20)
    assert got.adaptation is adaptation
    assert got.counted == ()


def test_what_was_counted_is_what_was_added() -> None:
    text, static, x = _world(3, 6, 0, 50)
    start = _scored(Adaptation.begin(text, static, 50.0), x[:20]).adaptation
    got = _scored(start, x[20:])
    both = start.statistics
    for rows in got.counted:
        both = rows.added_to(both)
    assert got.adaptation.images == 20 + sum(map(len, got.counted)) == 50
    for field in fields(Statistics):
        torch.testing.assert_close(getattr(got.adaptation.statistics, field.name), getattr(both, field.name))


def test_what_counts_nothing_makes_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    text, static, x = _world(3, 6, 1, 20)
    adaptation = _scored(Adaptation.begin(text, static, 50.0), x[:5]).adaptation
    monkeypatch.setattr(Statistics, "zeros", None)
    monkeypatch.setattr(Counted, "added_to", None)
    assert _scored(adaptation, x, [False] * 20).adaptation is adaptation


def test_no_more_is_counted_than_float32_can_feel() -> None:
    text, static, x = _world(3, 6, 0, 8)
    seen = replace(Statistics.zeros(3, 6), images=torch.tensor(float(FULL)))
    full = Adaptation.begin(text, static, 50.0, seen)
    assert _scored(full, x).adaptation is full
    nearly = Adaptation.begin(text, static, 50.0, replace(seen, images=torch.tensor(FULL - 1.0)))
    assert _scored(nearly, x[:1]).adaptation.statistics.images == FULL


def test_no_calibration_changes_who_is_first() -> None:
    text, static, x = _world(6, 10, 0, 200)
    adaptation = _scored(Adaptation.begin(text, static, 80.0), x).adaptation
    firsts = []
    for each in (-1.5, 0.0, 1.5):
        other = replace(adaptation, directions=replace(adaptation.directions, temperature=each))
        firsts.append(_scored(other, x, [False] * len(x)).fused.argmax(-1))
    assert torch.equal(firsts[0], firsts[1])
    assert torch.equal(firsts[1], firsts[2])


def test_identical_images_are_answered_by_the_text_head() -> None:
    """They differ from their mean by rounding alone, which has no direction."""
    text, static, x = _world(4, 64, 0, 1)
    adaptation, head = Adaptation.begin(text, static, 20.0), (20 * x @ text.T).softmax(-1)
    adaptation = _scored(adaptation, x).adaptation
    for _ in range(12):
        got = _scored(adaptation, x.expand(32, -1))
        adaptation = got.adaptation
        assert torch.equal(got.fused.argmax(-1), head.argmax(-1).expand(32))
        torch.testing.assert_close(got.statistics, torch.full((32, 4), 0.25))


@pytest.mark.parametrize("spread", [1e-4, 1e-3, 0.01, 0.03])
def test_thousands_of_images_that_hardly_differ_are_finite(spread: float) -> None:
    text, static, x = _world(4, 64, 0, 1)
    random = torch.Generator().manual_seed(0)
    few = torch.randn(2, 64, generator=random)
    adaptation = Adaptation.begin(text, static, 100.0)
    for _ in range(60):
        near = _unit(x + spread * torch.randn(64, 2, generator=random) @ few / 8)
        got = _scored(adaptation, near)
        adaptation = got.adaptation
        assert torch.isfinite(got.fused).all()
        assert torch.isfinite(got.statistics).all()
    assert adaptation.made_at > 3000


@pytest.mark.parametrize("tau", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("numbers", [[0] * 4, [1] * 4, [3] * 4, [0, 5, 0, 0], [300, 1, 1, 1]])
def test_any_logit_scale_and_any_shots_are_finite(tau: float, numbers: list[int]) -> None:
    text, most, x = _world(4, 8, 300, 100)
    static = _memory(*(shots.keys[:number] for shots, number in zip(most.classes, numbers, strict=True)))
    got = _scored(Adaptation.begin(text, static, tau), x)
    for p in (got.fused, got.statistics):
        assert torch.isfinite(p).all()
        torch.testing.assert_close(p.sum(-1), torch.ones(100))
    assert math.isfinite(got.adaptation.directions.weight)


def test_features_may_be_longer_than_the_images_are_many() -> None:
    text, static, x = _world(3, 300, 1, 40)
    got = _scored(Adaptation.begin(text, static, 100.0), x)
    assert torch.isfinite(got.fused).all()


def test_bytes_are_those_of_its_tensors() -> None:
    text, static, _ = _world(3, 5, 2, 0)
    sums = 3 * 5 + 3 + 5 + 5 * 5 + 1 + TEMPERATURES + 1
    loose = (LOOSE - 1) * (3 + 5 + TEMPERATURES + 1)
    read = 5 + 5 * 5 + 3 * 5 + 3
    assert Adaptation.begin(text, static, 50.0).nbytes == 4 * (2 * sums + loose + 2 * read)
    assert Adaptation.begin(text, static_without_shots(3, 5), 50.0).nbytes == 4 * (2 * sums + loose + read)
