"""Every image someone may send is developed, or refused by name: never anything else."""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from core.encoders.protocol import Preprocess
from core.encoders.views import augmented, digest, joined, plain, seed_of
from service.images import decode as decode_module
from service.images import errors, formats, small_jpeg
from service.images import limits as limits_module
from service.images.decode import Developed, decode, develop
from service.images.errors import ImageFault, ImageTooLarge, ImageUnreadable, UnsupportedMediaType
from service.images.limits import ImageLimits
from tests.support import pictures

LIMITS = ImageLimits()
EVERYTHING = ImageLimits(formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))
HOW = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def pixels(data: bytes, limits: ImageLimits = LIMITS) -> np.ndarray:
    image = decode(data, limits)
    assert image.mode == "RGB"
    return np.asarray(image, np.int32)


def furthest(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a - b).max())


# What is accepted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pictures.png, pictures.webp])
def test_a_lossless_picture_is_decoded_exactly(make: Callable[[], bytes]) -> None:
    assert furthest(pixels(make()), np.asarray(pictures.scene(), np.int32)) == 0


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
def test_a_jpeg_is_decoded_as_pillow_does_it(options: dict[str, bool]) -> None:
    data = pictures.jpeg(**options)
    assert np.abs(pixels(data) - np.asarray(pictures.scene(), np.int32)).mean() < 3


@pytest.mark.parametrize(
    "options", [{}, {"quality": 20}, {"subsampling": 0}, {"optimize": True}], ids=["usual", "poor", "full", "optimised"]
)
def test_a_small_jpeg_has_the_pixels_that_its_parser_would_give_it(
    options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pictures.encoded(pictures.noise(93, 61), "JPEG", **options)
    with monkeypatch.context() as patch:
        patch.setattr(decode_module, "small_jpeg_size", lambda _: None)
        by_parser = decode(data, LIMITS).tobytes()
    monkeypatch.setattr(decode_module, "PARSERS", {})
    assert decode(data, LIMITS).tobytes() == by_parser


def test_a_grey_jpeg_has_three_equal_channels() -> None:
    grey = pixels(pictures.encoded(pictures.scene().convert("L"), "JPEG"))
    assert furthest(grey[..., 0], grey[..., 2]) == 0


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
def test_formats_can_be_added_by_setting(kind: str) -> None:
    data = pictures.encoded(pictures.scene(), kind)
    assert furthest(pixels(data, EVERYTHING), np.asarray(pictures.scene(), np.int32)) == 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_picture_of_one_pixel_is_developed(kind: str) -> None:
    assert develop(pictures.one_pixel(kind), views=3, how=HOW, limits=LIMITS).pixels.shape == (3, 3, 32, 32)


@pytest.mark.parametrize(("width", "height"), [(1, 40_000), (40_000, 1), (1, 65_535)])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_a_picture_of_extreme_ratio_is_developed(width: int, height: int, mode: str) -> None:
    data = pictures.encoded(Image.new("L", (width, height), 90), "PNG")
    how = Preprocess(size=32, mean=HOW.mean, std=HOW.std, resize_mode=mode)
    assert develop(data, views=2, how=how, limits=LIMITS).pixels.amax() == 90


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF"])
def test_the_first_frame_of_an_animation_counts(kind: str) -> None:
    frame = pixels(pictures.animated(kind), EVERYTHING)
    assert furthest(frame, np.broadcast_to([255, 0, 0], (24, 32, 3))) <= 2


def test_whatever_follows_the_picture_is_not_looked_at() -> None:
    # Phones append a film to a photograph, with bytes that look like any number of scans.
    assert furthest(pixels(pictures.jpeg() + b"\xff\xda\0\2" * 500), pixels(pictures.jpeg())) == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_equals_the_upright_one(orientation: int, kind: str) -> None:
    upright = np.asarray(pictures.scene(), np.int32)
    difference = np.abs(pixels(pictures.turned(orientation, kind)) - upright)
    assert difference.mean() < (12 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_without_meaning_turns_nothing(orientation: int) -> None:
    assert furthest(pixels(pictures.turned(orientation)), np.asarray(pictures.scene(), np.int32)) == 0


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"II*\0",
        b"MM\0*\xff\xff\xff\xff",
        b"not a tiff header at all",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\xff\0\0\0\0",
        b"II*\0\x08\0\0\0\xff\xff" + bytes(range(40)),
    ],
)
def test_broken_exif_does_not_fail_a_fine_picture(garbage: bytes) -> None:
    assert furthest(pixels(pictures.broken_exif_jpeg(garbage)), pixels(pictures.jpeg())) == 0


def test_a_malformed_multi_picture_index_does_not_fail_a_fine_picture() -> None:
    data = pictures.with_segment(pictures.jpeg(), b"\xe2", b"MPF\0II*\0\x08\0\0\0\0\0")
    assert furthest(pixels(data), pixels(pictures.jpeg())) == 0


# From other modes to RGB ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pictures.cmyk_jpeg, pictures.plain_cmyk_jpeg])
def test_cmyk_is_read_the_right_way_round_with_and_without_adobes_marker(make: Callable[[], bytes]) -> None:
    row = pixels(make())[24]
    assert furthest(row[16], np.array([0, 255, 255])) < 12
    assert furthest(row[48], np.array([255, 255, 0])) < 12
    assert furthest(row[80], np.array([255, 255, 255])) < 12


def test_of_16_bits_the_high_byte_counts() -> None:
    grey = pixels(pictures.grey16_png())
    assert (grey == np.arange(256)[None, :, None]).all()


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[-5, 25_600, 65_535]], np.int32), [0, 100, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-1000.0, 0.0, 1000.0]], np.float32), [0, 128, 255]),
        (np.array([[-3e38, 0.0, 3e38]], np.float32), [0, 128, 255]),
        (np.array([[700.0, 700.0, 700.0]], np.float32), [0, 0, 0]),
    ],
)
def test_32_bits_are_scaled_to_8_by_the_range_that_holds_them(levels: np.ndarray, expected: list[int]) -> None:
    data = pictures.encoded(Image.fromarray(levels), "TIFF")
    assert pixels(data, EVERYTHING)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_levels_that_are_not_finite_are_refused(value: float) -> None:
    data = pictures.encoded(Image.fromarray(np.array([[0, value]], np.float32)), "TIFF")
    with pytest.raises(ImageUnreadable, match="not finite"):
        decode(data, EVERYTHING)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (pictures.rgba_png, [(0, 0, 255), (127, 127, 255), (255, 255, 255)]),
        (pictures.la_png, [(0, 0, 0), (127, 127, 127), (255, 255, 255)]),
        (pictures.palette_png, [(255, 0, 0), (127, 255, 127), (255, 255, 255)]),
        (pictures.keyed_png, [(255, 255, 255), (255, 0, 0)]),
        (pictures.bilevel_png, [(0, 0, 0), (255, 255, 255)]),
    ],
)
def test_what_is_transparent_shows_white(make: Callable[[], bytes], expected: list[tuple[int, int, int]]) -> None:
    assert furthest(pixels(make())[0], np.array(expected)) <= 1


def test_opaque_alpha_changes_nothing() -> None:
    image = pictures.scene().convert("RGBA")
    assert furthest(pixels(pictures.encoded(image, "PNG")), np.asarray(pictures.scene(), np.int32)) == 0


# What is refused ------------------------------------------------------------------------------------------------------


def test_each_fault_has_its_slug_and_status() -> None:
    known = {fault.slug: fault.status for fault in ImageFault.__subclasses__()}
    assert known == {"unsupported-media-type": 415, "image-unreadable": 422, "image-too-large": 413}


def test_no_bytes_are_unreadable() -> None:
    with pytest.raises(ImageUnreadable, match="0 bytes"):
        decode(b"", LIMITS)


@pytest.mark.parametrize(
    "data", [pictures.text(), b"\0", b"\xff\xd8", b"BM, said the cat to the mouse.", b"RIFF....WAVE"]
)
def test_what_is_no_image_is_unreadable(data: bytes) -> None:
    with pytest.raises(ImageUnreadable, match="no image in a known format"):
        decode(data, LIMITS)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("GIF", pictures.gif()),
        ("BMP", pictures.encoded(pictures.scene(), "BMP")),
        ("TIFF", pictures.encoded(pictures.scene(), "TIFF")),
        ("TIFF", pictures.encoded(pictures.scene(), "TIFF", big_tiff=True)),
        ("AVIF", pictures.encoded(pictures.scene(), "AVIF")),
        ("ICO", pictures.encoded(pictures.scene(), "ICO")),
        ("JPEG 2000", pictures.encoded(pictures.scene(), "JPEG2000")),
        ("JPEG 2000", pictures.encoded(pictures.scene(), "JPEG2000", no_jp2=True)),
        ("PDF", pictures.encoded(pictures.scene(), "PDF")),
        ("PostScript", pictures.encoded(pictures.scene(), "EPS")),
        ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0"),
        ("JPEG XL", b"\xff\x0a\0\0"),
        ("PSD", b"8BPS\0\1\0\0\0\0\0\0"),
        ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("SVG", b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n<svg width="9">'),
    ],
)
def test_a_known_format_that_is_not_accepted_is_named(kind: str, data: bytes) -> None:
    with pytest.raises(UnsupportedMediaType, match=rf"format {kind},.*JPEG, PNG or WEBP"):
        decode(data, LIMITS)


def test_a_refused_format_reaches_no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    parsers = {kind: lambda _, kind=kind: shown.append(kind) for kind in formats.PARSERS}
    monkeypatch.setattr(decode_module, "PARSERS", parsers)
    with pytest.raises(UnsupportedMediaType):
        decode(pictures.gif(), LIMITS)
    assert shown == []


def test_too_many_bytes_are_refused_with_both_numbers() -> None:
    with pytest.raises(ImageTooLarge, match=r"20,000,\d\d\d bytes; the limit is 16,777,216 bytes"):
        decode(pictures.heavy_png(), LIMITS)


def test_the_byte_limit_itself_is_allowed() -> None:
    data = pictures.png()
    decode(data, ImageLimits(max_bytes=len(data)))
    with pytest.raises(ImageTooLarge):
        decode(data, ImageLimits(max_bytes=len(data) - 1))


def test_the_pixel_limit_itself_is_allowed() -> None:
    decode(pictures.png(20, 10), ImageLimits(max_pixels=200))
    with pytest.raises(ImageTooLarge, match="20 x 10 = 200 pixels; the limit is 199 pixels"):
        decode(pictures.png(20, 10), ImageLimits(max_pixels=199))


@pytest.mark.parametrize("side", [9_000, 13_000, 20_000])
def test_a_tiny_file_of_enormous_size_is_refused_before_it_is_decoded(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats.PngImageFile, "load", lambda _: pytest.fail("decoded"))
    data = pictures.huge_png(side)
    assert len(data) < 50_000
    with pytest.raises(ImageTooLarge, match=f"{side} x {side}"):
        decode(data, LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_held_to_the_pixel_limit(kind: str) -> None:
    data = pictures.encoded(pictures.scene(40, 30), kind)
    with pytest.raises(ImageTooLarge, match="40 x 30"):
        decode(data, ImageLimits(max_pixels=1199, formats=EVERYTHING.formats))


def test_a_side_longer_than_any_jpegs_is_refused() -> None:
    with pytest.raises(ImageTooLarge, match="1 x 65536 pixels; the limit is 65,535 pixels a side"):
        decode(pictures.claiming_png(1, 65_536), LIMITS)


def test_a_pillow_limit_below_ours_is_the_same_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageTooLarge, match="Scale"):
        decode(pictures.webp(), LIMITS)


def test_large_pictures_within_a_raised_limit_neither_warn_nor_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(pictures.png(), LIMITS).size == (96, 64)


def test_nothing_global_of_pillow_is_set() -> None:
    assert Image.MAX_IMAGE_PIXELS == 2**30 // 12
    assert formats.PngImageFile.__module__ == "PIL.PngImagePlugin"
    assert sys.modules["PIL.ImageFile"].LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("make", [pictures.jpeg, pictures.png, pictures.webp])
def test_a_truncated_picture_is_unreadable(make: Callable[..., bytes], share: float) -> None:
    with pytest.raises(ImageUnreadable, match="cannot be decoded"):
        decode(pictures.truncated(make(320, 240), share), LIMITS)


@pytest.mark.parametrize("make", [pictures.text_bomb_png, pictures.profile_bomb_png])
def test_metadata_that_unpacks_to_a_bomb_is_unreadable(make: Callable[[], bytes]) -> None:
    data = make()
    assert len(data) < 70_000
    with pytest.raises(ImageUnreadable, match="too large"):
        decode(data, LIMITS)


def test_a_jpeg_of_countless_scans_is_unreadable() -> None:
    decode(pictures.scanned_jpeg(limits_module.MAX_JPEG_SCANS - 9), LIMITS)
    with pytest.raises(ImageUnreadable, match="64 scans"):
        decode(pictures.scanned_jpeg(5000), LIMITS)


@pytest.mark.parametrize("hidden", [b"\xff\xd9", b"\xff\xda\0\x02", b"\xff\xd8"])
def test_segments_that_look_like_an_end_or_a_scan_hide_and_add_none(hidden: bytes) -> None:
    data = pictures.with_segment(pictures.scanned_jpeg(60), b"\xfe", hidden)
    with pytest.raises(ImageUnreadable, match="64 scans"):
        decode(data, LIMITS)
    decode(pictures.with_segment(pictures.jpeg(), b"\xfe", hidden * 200), LIMITS)


def test_a_jpeg_of_countless_segments_is_unreadable() -> None:
    decode(pictures.with_segment(pictures.jpeg(), b"\xe1", b"Exif\0\0x", 512), LIMITS)
    with pytest.raises(ImageUnreadable, match="1,024 segments"):
        decode(pictures.with_segment(pictures.jpeg(), b"\xe1", b"Exif\0\0x", 1024), LIMITS)


def test_a_png_of_countless_chunks_is_unreadable() -> None:
    decode(pictures.chunked_png(2000), LIMITS)
    with pytest.raises(ImageUnreadable, match="65,536 chunks"):
        decode(pictures.chunked_png(limits_module.MAX_PNG_CHUNKS), LIMITS)


@pytest.mark.parametrize(
    "error",
    [
        OSError,
        SyntaxError,
        ValueError,
        struct.error,
        EOFError,
        zlib.error,
        MemoryError,
        OverflowError,
        IndexError,
        KeyError,
        TypeError,
        RuntimeError,
        RecursionError,
        ZeroDivisionError,
        AttributeError,
        AssertionError,
    ],
)
def test_whatever_a_parser_raises_makes_the_image_unreadable(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def parser(_: object) -> None:
        raise error

    monkeypatch.setitem(formats.PARSERS, "PNG", parser)
    with pytest.raises(ImageUnreadable, match=error.__name__) as caught:
        decode(pictures.png(), LIMITS)
    assert isinstance(caught.value.__cause__, error)


def test_a_parser_that_is_interrupted_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def parser(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(formats.PARSERS, "PNG", parser)
    with pytest.raises(KeyboardInterrupt):
        decode(pictures.png(), LIMITS)


def test_messages_are_whole_sentences_of_bounded_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def parser(_: object) -> None:
        raise ValueError("a\nb" * 1000)

    monkeypatch.setitem(formats.PARSERS, "PNG", parser)
    with pytest.raises(ImageUnreadable) as caught:
        decode(pictures.png(), LIMITS)
    message = str(caught.value)
    assert len(message) < 400
    assert "\n" not in message
    assert message.startswith("The ")
    assert message.endswith(".")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "data",
    [
        pictures.jpeg(),
        pictures.jpeg(progressive=True),
        pictures.turned(6, "JPEG"),
        pictures.cmyk_jpeg(),
        pictures.png(),
        pictures.palette_png(),
        pictures.webp(),
        pictures.animated("WEBP"),
        pictures.gif(),
        pictures.encoded(pictures.scene(), "BMP"),
        pictures.encoded(pictures.scene(), "TIFF", compression="tiff_lzw"),
    ],
    ids=["jpeg", "progressive", "turned", "cmyk", "png", "palette", "webp", "animated", "gif", "bmp", "tiff"],
)
def test_damaged_files_are_developed_or_refused_and_nothing_else(data: bytes, seed: int) -> None:
    limits = ImageLimits(max_pixels=10**6, formats=EVERYTHING.formats)
    rng = np.random.default_rng(seed)
    for _ in range(8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on garbled metadata: only noise to a service
            try:
                developed = develop(damaged(data, rng), views=1, how=HOW, limits=limits)
            except ImageFault as fault:
                assert str(fault).endswith(".")  # noqa: PT017 - either outcome is right
            else:
                assert developed.pixels.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("room", [5000, sys.maxsize])
def test_a_small_jpeg_with_a_damaged_head_has_the_verdict_that_its_parser_would_give_it(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verdict(data: bytes) -> object:
        try:
            return decode(data, ImageLimits(max_pixels=10**6), room).tobytes()
        except (ImageFault, errors.Heavy) as refusal:
            return type(refusal), str(refusal)

    data = pictures.encoded(pictures.noise(40, 17), "JPEG")
    assert small_jpeg.small_jpeg_size(data) == (40, 17)
    sent = [data, *head_damaged(data)]
    verdicts = [verdict(each) for each in sent]
    monkeypatch.setattr(decode_module, "small_jpeg_size", lambda _: None)
    monkeypatch.setattr(limits_module, "_has_few_markers", lambda _: False)
    assert verdicts == [verdict(each) for each in sent]


def head_damaged(data: bytes) -> Iterator[bytes]:
    """Yield a JPEG cut short, with one other byte, and with an odd segment more, everywhere before its pixels."""
    end = data.index(b"\xff\xda") + 14
    for at in range(3, end):
        yield data[:at]
        yield from (data[:at] + bytes([other]) + data[at + 1 :] for other in (0, 1, 3, 0x43, 0xFF))
        if data[at] == 0xFF:
            yield from (data[:at] + odd + data[at:] for odd in ODD_SEGMENTS)


ODD_SEGMENTS = (
    b"\xff",
    b"\xff\x01",
    b"\xff\xd9",
    b"\xff\xe0\0\x06JFIF",
    b"\xff\xe1\0\x08Exif\0\0",
    b"\xff\xed\0\x16Photoshop 3.0\x008BIM\0\0",
    b"\xff\xee\0\x0eAdobe\0d\0\0\0\0\0",
    b"\xff\xc4\0\0",
    b"\xff\xdb\0\2",
    b"\xff\xda\0\2",
)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the data after a few random bytes were changed, and sometimes a piece cut out or doubled."""
    changed = bytearray(data)
    for at in rng.integers(len(changed), size=rng.integers(1, 9)):
        # Most of a file's meaning is in its head.
        changed[at if rng.random() < 0.5 else at % 64] = rng.integers(256)
    start, stop = sorted(rng.integers(len(changed), size=2))
    choice = rng.random()
    if choice < 0.2:
        del changed[start:stop]
    elif choice < 0.4:
        changed[start:start] = changed[start:stop]
    return bytes(changed)


# Development ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_an_image_is_developed_to_the_views_that_core_draws(count: int) -> None:
    first = plain(pictures.scene(), HOW)
    developed = develop(pictures.png(), views=count, how=HOW, limits=LIMITS)
    assert developed.pixels.dtype == torch.uint8
    others = augmented(pictures.scene(), count - 1, HOW, seed=seed_of(first))
    assert torch.equal(developed.pixels, joined(first, others))
    assert developed.digest == digest(first)


def test_the_digest_is_of_pixels_not_of_bytes() -> None:
    png, webp = (develop(data, views=1, how=HOW, limits=LIMITS) for data in (pictures.png(), pictures.webp()))
    assert png.digest == webp.digest
    assert png.digest != develop(pictures.png(95), views=1, how=HOW, limits=LIMITS).digest


def test_the_digest_does_not_depend_on_the_number_of_views() -> None:
    assert len({develop(pictures.jpeg(), views=n, how=HOW, limits=LIMITS).digest for n in (1, 2, 5)}) == 1


def test_threads_neither_disturb_each_other_nor_the_bad_images_among_them() -> None:
    sent = [pictures.jpeg(), pictures.png(), pictures.webp(), pictures.text(), pictures.huge_png(9_000)] * 8

    def outcome(data: bytes) -> str:
        try:
            return develop(data, views=3, how=HOW, limits=LIMITS).digest
        except ImageFault as fault:
            return fault.slug

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(outcome, sent)) == [outcome(data) for data in sent]


@pytest.mark.parametrize("make", [pictures.jpeg, pictures.png, pictures.webp])
def test_a_developed_image_holds_nothing_of_what_was_sent(make: Callable[[], bytes]) -> None:
    data = make()
    before = sys.getrefcount(data)
    developed = develop(data, views=2, how=HOW, limits=LIMITS)
    assert sys.getrefcount(data) == before
    assert developed.pixels.untyped_storage().nbytes() == 2 * 3 * 32 * 32


def test_developed_and_limits_are_frozen() -> None:
    with pytest.raises(AttributeError):
        LIMITS.max_bytes = 1
    with pytest.raises(AttributeError):
        Developed(pixels=torch.zeros(1, 3, 2, 2, dtype=torch.uint8), digest="0" * 20).digest = "1"


@pytest.mark.parametrize(
    "wrong", [{"max_bytes": 0}, {"max_pixels": 0}, {"formats": ()}, {"formats": ("PNG", "EPS")}, {"formats": ("png",)}]
)
def test_limits_that_admit_nothing_or_the_unknown_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Image"):
        ImageLimits(**wrong)
