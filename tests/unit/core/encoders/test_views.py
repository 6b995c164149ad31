"""View 1 is open_clip's picture; the others are drawn from a seed, and only from it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from core.encoders import augmix, views
from core.encoders.protocol import Preprocess
from core.encoders.views import augmented, crops, digest, joined, plain, seed_of
from core.errors import InvalidImage
from tests.support.pictures import noise, scene

HOW = Preprocess(size=48, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
MODES = ("shortest", "squash", "longest")


def views_of(image: Image.Image, count: int, how: Preprocess, *, seed: int) -> Tensor:
    return joined(plain(image, how), augmented(image, count - 1, how, seed=seed))


def by_open_clip(image: Image.Image, how: Preprocess) -> Tensor:
    """Return open_clip's evaluation transform as uint8, its normalisation by (0, 1) undone."""
    transform = open_clip.image_transform(
        how.size,
        is_train=False,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        resize_mode=how.resize_mode,
        interpolation=how.interpolation,
        fill_color=how.fill,
    )
    return (transform(image) * 255).round().to(torch.uint8)


# View 1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(48, 48), (96, 64), (63, 101), (640, 479), (30, 20), (1, 1), (2, 31), (317, 11)])
def test_the_plain_view_is_open_clips_bit_for_bit(mode: str, interpolation: str, size: tuple[int, int]) -> None:
    how = replace(HOW, resize_mode=mode, interpolation=interpolation, fill=17)
    image = noise(*size)
    assert torch.equal(plain(image, how), by_open_clip(image, how))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    size=st.integers(1, 64),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 99),
)
def test_the_plain_view_is_open_clips_for_every_ordinary_ratio(
    width: int, height: int, size: int, mode: str, seed: int
) -> None:
    # Beyond a ratio of 32 we differ; and of thin pictures in a tiny square open_clip's long-side resize leaves nothing.
    long, short = max(width, height), min(width, height)
    image = noise(width, height, seed)
    how = replace(HOW, size=size, resize_mode=mode)
    if long <= 32 * short and (mode != "longest" or round(short / (long / size)) > 0):
        assert torch.equal(plain(image, how), by_open_clip(image, how))
    assert plain(image, how).shape == (3, size, size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1800, 40), (40, 1801), (41, 1800)])
def test_the_plain_view_of_a_thin_picture_is_nearly_open_clips(mode: str, size: tuple[int, int]) -> None:
    how = replace(HOW, resize_mode=mode)
    image = scene(*size)
    difference = plain(image, how).float() - by_open_clip(image, how).float()
    assert difference.abs().mean() < 1.5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 400_000), (400_000, 1), (3, 100_000), (60_000, 2)])
def test_an_extreme_picture_is_seen_without_an_enormous_picture_in_between(
    mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    resize = Image.Image.resize

    def watched(image: Image.Image, to: tuple[int, int], *args: object, **kwargs: object) -> Image.Image:
        # Pillow's first pass holds the new width times the old height; its second, the new picture.
        held.append(max(to[0] * image.height, to[0] * to[1]))
        return resize(image, to, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    image = Image.new("RGB", size, (10, 200, 30))
    pixels = plain(image, replace(HOW, resize_mode=mode))
    assert pixels.shape == (3, 48, 48)
    assert pixels.amax((1, 2)).tolist() == [10, 200, 30]
    assert max(held) < 2**20


def test_longest_pads_with_the_fill() -> None:
    pixels = plain(Image.new("RGB", (96, 48), "red"), replace(HOW, resize_mode="longest", fill=7))
    assert pixels[:, 0, 0].tolist() == [7, 7, 7]
    assert pixels[:, 24, 24].tolist() == [255, 0, 0]


def test_the_views_can_be_written_to() -> None:
    pixels = plain(Image.new("RGB", (1, 1)), replace(HOW, size=1))
    pixels[0] = 3
    assert pixels[0].item() == 3


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_a_picture_that_is_not_rgb_is_refused(mode: str) -> None:
    with pytest.raises(InvalidImage, match=mode):
        plain(Image.new(mode, (8, 8)), HOW)


@pytest.mark.parametrize("size", [(0, 8), (8, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidImage, match=f"{size[0]} x {size[1]}"):
        views_of(Image.new("RGB", size), 2, HOW, seed=0)


@pytest.mark.parametrize("change", [{"resize_mode": "crop"}, {"interpolation": "nearest"}])
def test_an_unknown_preprocessing_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(change.values()))):
        plain(scene(), replace(HOW, **change))


# Views 2..V -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("mode", MODES)
def test_the_first_view_is_the_plain_one_and_all_are_uint8_of_the_encoders_size(count: int, mode: str) -> None:
    how = replace(HOW, resize_mode=mode)
    drawn = views_of(scene(), count, how, seed=5)
    assert drawn.shape == (count, 3, 48, 48)
    assert drawn.dtype == torch.uint8
    assert torch.equal(drawn[0], plain(scene(), how))


@settings(max_examples=15, deadline=None)
@given(fewer=st.integers(1, 6), more=st.integers(0, 6), seed=st.integers(0, 2**64 - 1))
def test_asking_for_more_views_extends_the_list(fewer: int, more: int, seed: int) -> None:
    image = noise(70, 50)
    assert torch.equal(
        views_of(image, fewer + more, HOW, seed=seed)[:fewer],
        views_of(image, fewer, HOW, seed=seed),
    )


def test_a_picture_and_a_seed_give_the_same_views_in_every_thread() -> None:
    image = noise(300, 200)
    expected = views_of(image, 6, HOW, seed=11)
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda _: views_of(image, 6, HOW, seed=11), range(12)))
    assert all(torch.equal(one, expected) for one in drawn)


def test_other_seeds_give_other_views_and_the_same_plain_one() -> None:
    one, other = views_of(scene(), 6, HOW, seed=1), views_of(scene(), 6, HOW, seed=2)
    assert torch.equal(one[0], other[0])
    assert not any(torch.equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))


def test_global_generators_neither_matter_nor_move() -> None:
    np.random.seed(3)  # noqa: NPY002 - the global generator is what is tested
    torch.manual_seed(3)
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002 - as above
    views_of(scene(), 4, HOW, seed=1)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002 - as above
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_the_picture_itself_is_left_alone() -> None:
    image = scene()
    before = image.tobytes()
    views_of(image, 8, HOW, seed=1)
    assert image.tobytes() == before


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (2, 3), (48, 48)])
def test_odd_sizes_have_augmented_views_too(size: tuple[int, int]) -> None:
    assert augmented(noise(*size), 4, HOW, seed=1).shape == (4, 3, 48, 48)


def test_no_augmented_view_is_an_empty_list() -> None:
    assert augmented(scene(), 0, HOW, seed=1).shape == (0, 3, 48, 48)


@settings(max_examples=80, deadline=None)
@given(width=st.integers(60, 400), height=st.integers(60, 400), seed=st.integers(0, 2**32))
def test_crops_lie_inside_the_picture_with_the_promised_area_and_ratio(width: int, height: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, top, right, bottom = views._box(width, height, rng)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    # Sides are whole pixels, at most half of one away from what was drawn.
    assert (w - 0.5) / (h + 0.5) <= 4 / 3
    assert (w + 0.5) / (h - 0.5) >= 3 / 4
    if max(width, height) <= 4 / 3 * min(width, height):
        assert (w + 0.5) * (h + 0.5) >= 0.5 * width * height


def test_a_picture_too_thin_for_random_crops_gives_its_middle() -> None:
    assert views._box(1000, 30, np.random.default_rng(0)) == (480, 0, 520, 30)
    assert views._box(30, 1000, np.random.default_rng(0)) == (0, 480, 30, 520)


def test_half_of_the_crops_are_flipped() -> None:
    # Brighter on the right: a crop without AugMix shows by its slope whether it was flipped.
    image = Image.fromarray(np.tile(np.linspace(0, 255, 128).astype(np.uint8)[None, :, None], (128, 1, 3)))
    rng = np.random.default_rng(0)
    crops = [np.asarray(views._crop(image, 24, rng), np.int32) for _ in range(400)]
    flipped = sum(crop[:, 0].mean() > crop[:, -1].mean() for crop in crops)
    assert 160 < flipped < 240


@pytest.mark.parametrize("operation", augmix._OPERATIONS)
def test_every_operation_keeps_the_size_and_is_mild(operation: object) -> None:
    image = scene(48, 48)
    drawn = [operation(image, np.random.default_rng(seed)) for seed in range(20)]
    assert {(one.size, one.mode) for one in drawn} == {((48, 48), "RGB")}
    change = [np.abs(np.asarray(one, np.float32) - np.asarray(image, np.float32)).mean() for one in drawn]
    assert max(change) < 45
    assert max(change) > 0


def test_mixing_before_an_affine_normalisation_is_mixing_after_it() -> None:
    # What the comment in `_augmix` claims; the chains of one seed are the same both ways.
    image = scene(48, 48)
    rng = np.random.default_rng(4)
    weights, share = rng.dirichlet(np.ones(3)), rng.beta(1.0, 1.0)
    chains = [np.asarray(augmix._chain(image, rng), np.float64) for _ in range(3)]
    mean, std = np.array(HOW.mean), np.array(HOW.std)

    def normal(pixels: np.ndarray) -> np.ndarray:
        return (pixels / 255 - mean) / std

    after = share * normal(np.asarray(image, np.float64))
    after += (1 - share) * sum(weight * normal(chain) for weight, chain in zip(weights, chains, strict=True))
    before = normal(np.asarray(augmix.augmix(image, np.random.default_rng(4)), np.float64))
    assert np.abs(before - after).max() <= (0.501 / 255 / std).max()


def test_views_of_a_large_picture_are_those_of_the_full_picture_but_for_small_differences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = scene(900, 600)
    quick = augmented(image, 8, HOW, seed=2).float()
    monkeypatch.setattr(views, "_reduced", lambda image, _: image)
    assert (augmented(image, 8, HOW, seed=2).float() - quick).abs().mean() < 3


# Seed and digest ------------------------------------------------------------------------------------------------------


def test_seed_and_digest_depend_on_content_alone() -> None:
    pixels = plain(scene(), HOW)
    strided = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not strided.is_contiguous()
    assert digest(pixels) == digest(strided.clone()) == digest(strided)
    assert seed_of(pixels) == seed_of(strided)


def test_seed_and_digest_change_with_one_level_of_one_pixel() -> None:
    pixels = plain(scene(), HOW)
    changed = pixels.clone()
    changed[1, 2, 3] ^= 1
    assert digest(pixels) != digest(changed)
    assert seed_of(pixels) != seed_of(changed)


def test_the_digest_covers_the_shape() -> None:
    assert digest(torch.zeros(3, 2, 2, dtype=torch.uint8)) != digest(torch.zeros(3, 1, 1, dtype=torch.uint8))


def test_seed_and_digest_never_change_between_releases() -> None:
    # Slots in a store are named by them.
    pixels = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    assert digest(pixels) == DIGEST
    assert seed_of(pixels) == SEED


def test_seed_and_digest_have_the_promised_form() -> None:
    pixels = plain(scene(), HOW)
    assert 0 <= seed_of(pixels) < 2**64
    assert len(digest(pixels)) == 20
    assert set(digest(pixels)) <= set("0123456789abcdef")


# sha256 of bytes 0..11, and of "(3, 2, 2)" before them, worked outside of core.
SEED = 0xFFF3A9BCDD37363D
DIGEST = "d65d49714a5b7e53c4a5"


def test_crops_are_those_of_their_seed_and_are_cut_and_flipped_alone() -> None:
    """Of one colour nothing but that colour can be cut, and AugMix would change it."""
    flat = Image.new("RGB", (60, 40), (10, 200, 90))
    made = crops(flat, 3, HOW, seed=1)
    assert made.shape == (3, 3, HOW.size, HOW.size)
    assert (made.flatten(2) == torch.tensor([10, 200, 90])[None, :, None]).all()
    picture = noise(60, 40)
    assert torch.equal(crops(picture, 3, HOW, seed=1)[:2], crops(picture, 2, HOW, seed=1))
    assert not torch.equal(crops(picture, 1, HOW, seed=1), crops(picture, 1, HOW, seed=2))
    assert len(crops(picture, 0, HOW, seed=1)) == 0
    with pytest.raises(InvalidImage):
        crops(picture.convert("L"), 1, HOW, seed=1)
