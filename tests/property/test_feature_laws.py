"""Laws of what enters and of what is made from it: unit norms, entropies, prompts, fusion, bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.errors import IncompatibleMemory, InvalidFeature
from core.memory.codec import FEATURE_BYTES, decode_features, encode_feature
from core.numerics import affinity, checked_unit, entropy, unit
from core.prompts import class_weights, prompts_of
from core.readout.fusion import fuse
from tests.property.worlds import array, close, directions, gaussian
from tests.support import literal

SEEDS = st.integers(0, 2**32 - 1).map(np.random.default_rng)
DIMS = st.integers(1, 12)
BROKEN = st.sampled_from((math.nan, math.inf, -math.inf))


@st.composite
def probabilities(draw: st.DrawFn) -> Tensor:
    """Draw rows that sum to one, from flat to nearly certain."""
    rng, rows, classes = draw(SEEDS), draw(st.integers(1, 5)), draw(st.integers(1, 8))
    return (draw(st.sampled_from((0.1, 1.0, 10.0, 100.0))) * gaussian(rng, rows, classes)).softmax(-1)


@given(SEEDS, DIMS, st.integers(1, 5), st.floats(1e-8, 1e15))
def test_a_checked_feature_has_unit_norm_and_its_own_direction(
    rng: np.random.Generator, dim: int, rows: int, length: float
) -> None:
    wanted = directions(rng, rows, dim)
    given_features = (length * wanted.double()).to(torch.float32)
    got = checked_unit(given_features, dim=dim)
    assert got.dtype == torch.float32
    close(torch.linalg.vector_norm(got, dim=-1), torch.ones(rows), 1e-6)
    close(got, wanted, 1e-6)


@given(SEEDS, DIMS, st.sampled_from((1e-13, 1e-15, 1e-17, 1e-25, 1e25)))
def test_a_feature_of_extreme_length_gets_unit_norm_or_is_refused(
    rng: np.random.Generator, dim: int, length: float
) -> None:
    try:
        got = checked_unit(length * directions(rng, dim), dim=dim)
    except InvalidFeature:
        return
    close(torch.linalg.vector_norm(got), torch.tensor(1.0), 1e-5)


@given(SEEDS, st.integers(1, 6), DIMS, BROKEN, st.data())
def test_one_value_that_is_not_finite_refuses_the_features(
    rng: np.random.Generator, rows: int, dim: int, broken: float, data: st.DataObject
) -> None:
    features = gaussian(rng, rows, dim)
    features[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, dim - 1))] = broken
    with pytest.raises(InvalidFeature, match="not finite"):
        checked_unit(features)


@given(SEEDS, st.integers(1, 6), DIMS, st.data())
def test_one_row_of_zeros_refuses_the_features(
    rng: np.random.Generator, rows: int, dim: int, data: st.DataObject
) -> None:
    features = gaussian(rng, rows, dim)
    features[data.draw(st.integers(0, rows - 1))] = 0.0
    with pytest.raises(InvalidFeature, match="zeros"):
        checked_unit(features)


@given(SEEDS, DIMS, DIMS)
def test_a_feature_of_another_size_is_refused(rng: np.random.Generator, dim: int, other: int) -> None:
    if dim != other:
        with pytest.raises(InvalidFeature, match=f"{dim} entries; expected {other}"):
            checked_unit(gaussian(rng, dim), dim=other)


@given(SEEDS, DIMS, st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)))
def test_any_floating_type_becomes_float32(rng: np.random.Generator, dim: int, dtype: torch.dtype) -> None:
    feature = directions(rng, dim).to(dtype)
    before = feature.clone()
    got = checked_unit(feature)
    assert got.dtype == torch.float32
    close(got, literally_unit(feature), 1e-6)
    assert torch.equal(feature, before)


def literally_unit(feature: Tensor) -> Tensor:
    return torch.from_numpy(literal.u(feature.double().numpy())).to(torch.float32)


@given(probabilities(), st.sampled_from((1e-6, 1e-8)))
def test_entropy_is_the_literal_sum_and_stays_within_ln_c(p: Tensor, eps: float) -> None:
    got = entropy(p, eps)
    expected = [literal.entropy(row, eps) for row in array(p)]
    np.testing.assert_allclose(got.numpy(), np.array(expected), rtol=0, atol=2e-6)
    assert (got >= -2e-6).all()
    assert (got <= math.log(p.shape[-1]) + 2e-6).all()


@given(st.lists(st.floats(-1.0, 1.0), min_size=1), st.floats(0.0, 1e4))
def test_affinity_grows_with_the_cosine_and_stays_within_one(cosines: list[float], beta: float) -> None:
    got = affinity(torch.tensor(sorted(cosines)), beta)
    assert (got >= 0).all()
    assert (got <= 1).all()
    assert (got.diff() >= 0).all()


@given(probabilities(), SEEDS, st.tuples(*[st.floats(0.0, 1000.0)] * 3), st.booleans())
def test_fusion_is_a_mean_of_what_is_there(
    text: Tensor,
    rng: np.random.Generator,
    weights: tuple[float, float, float],
    shots: bool,  # noqa: FBT001 - drawn
) -> None:
    dynamic, static = (gaussian(rng, *text.shape).softmax(-1) for _ in range(2))
    got = fuse(text, dynamic, static if shots else None, weights)
    close(got.sum(-1), torch.ones(len(got)), 2e-6)
    there = torch.stack([text, dynamic, static] if shots else [text, dynamic])
    assert (got <= there.max(0).values + 1e-6).all()
    assert (got >= there.min(0).values - 1e-6).all()


@given(probabilities(), SEEDS, st.tuples(*[st.floats(0.1, 100.0)] * 3), st.floats(0.01, 100.0))
def test_only_the_proportions_of_the_fusion_weights_matter(
    text: Tensor, rng: np.random.Generator, weights: tuple[float, float, float], factor: float
) -> None:
    dynamic, static = (gaussian(rng, *text.shape).softmax(-1) for _ in range(2))
    a1, a2, a3 = weights
    scaled = fuse(text, dynamic, static, (factor * a1, factor * a2, factor * a3))
    close(fuse(text, dynamic, static, weights), scaled, 2e-6)


@given(SEEDS, DIMS, st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_class_weights_are_the_literal_mean(rng: np.random.Generator, dim: int, counts: list[int]) -> None:
    features = [directions(rng, count, dim) + 3.0 * directions(rng, dim) for count in counts]
    got = class_weights(features)
    np.testing.assert_allclose(got.numpy(), literal.eq_1([list(array(own)) for own in features]), rtol=0, atol=2e-5)


@given(SEEDS, st.integers(2, 12), st.integers(2, 5), st.data())
def test_neither_order_nor_length_of_prompt_features_matters(
    rng: np.random.Generator, dim: int, count: int, data: st.DataObject
) -> None:
    features = directions(rng, count, dim) + 3.0 * directions(rng, dim)
    order = data.draw(st.permutations(range(count)))
    lengths = torch.from_numpy(rng.uniform(0.5, 2.0, (count, 1)).astype(np.float32))
    close(class_weights([features]), class_weights([(lengths * features)[order]]), 2e-5)


@given(
    st.text("a_é {}.", max_size=12),
    st.lists(st.text("a_é {}.", max_size=12), max_size=3),
    st.lists(st.text("a_é {}.", max_size=12), max_size=3),
)
def test_any_text_is_a_name_a_template_or_a_sentence(name: str, templates: list[str], sentences: list[str]) -> None:
    got = prompts_of(name, templates, sentences)
    assert len(got) == len(templates) + len(sentences)
    assert list(got[len(templates) :]) == sentences
    for template, prompt in zip(templates, got, strict=False):
        assert prompt == name.replace("_", " ").join(template.split("{}"))


@given(SEEDS, DIMS)
def test_a_feature_comes_back_from_bytes_bit_for_bit(rng: np.random.Generator, dim: int) -> None:
    feature = directions(rng, dim).to(torch.float16)
    data = encode_feature(feature)
    assert len(data) == FEATURE_BYTES * dim
    back = decode_features(data, dim)[0]
    assert back.dtype == torch.float16
    assert torch.equal(back, feature)
    assert encode_feature(back) == data


@given(SEEDS, DIMS)
def test_half_precision_turns_a_unit_feature_by_little(rng: np.random.Generator, dim: int) -> None:
    feature = directions(rng, dim)
    back = decode_features(encode_feature(feature), dim)[0]
    assert (unit(back.float()) @ feature).item() > 1 - 1e-5


@given(st.binary(max_size=30), st.integers(1, 12))
def test_bytes_of_no_whole_number_of_features_are_refused(data: bytes, dim: int) -> None:
    if len(data) % (FEATURE_BYTES * dim):
        with pytest.raises(
            IncompatibleMemory, match=f"{len(data)} bytes; expected a multiple of {FEATURE_BYTES * dim}"
        ):
            decode_features(data, dim)
