from __future__ import annotations

import pytest
import torch

from core.errors import IncompatibleMemory
from core.memory.codec import FEATURE_FORMAT, decode_features, encode_feature


def test_bytes_are_little_endian_halves() -> None:
    assert FEATURE_FORMAT == "f16le"
    assert encode_feature(torch.tensor([1.0, -2.0])) == b"\x00\x3c\x00\xc0"


def test_bytes_become_a_half_precision_feature() -> None:
    got = decode_features(b"\x00\x3c\x00\xc0", 2)[0]
    assert got.dtype == torch.float16
    assert got.tolist() == [1.0, -2.0]


def test_a_decoded_feature_owns_its_memory() -> None:
    data = b"\x00\x3c"
    decode_features(data, 1)[0][0] = 5.0
    assert data == b"\x00\x3c"


def test_a_feature_that_needs_a_gradient_is_encoded_too() -> None:
    assert encode_feature(torch.ones(1, requires_grad=True)) == b"\x00\x3c"


def test_many_features_are_read_as_one_after_the_other_bit_for_bit() -> None:
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    data = b"".join(encode_feature(feature) for feature in features)
    got = decode_features(data, 3)
    assert torch.equal(got, features.half())
    assert torch.equal(got, torch.stack([decode_features(data[at : at + 6], 3)[0] for at in range(0, len(data), 6)]))


def test_every_half_comes_back_as_it_went() -> None:
    """Not-a-numbers, both zeros and the subnormals too: the codec is no judge."""
    data = b"".join(bits.to_bytes(2, "little") for bits in range(1 << 16))
    got = decode_features(data, 256)
    assert got.shape == (256, 256)
    assert b"".join(encode_feature(row) for row in got) == data


def test_no_bytes_are_no_features() -> None:
    got = decode_features(b"", 4)
    assert (got.shape, got.dtype) == ((0, 4), torch.float16)


def test_decoded_features_own_their_memory() -> None:
    data = b"\x00\x3c" * 2
    decode_features(data, 1)[:] = 5.0
    assert data == b"\x00\x3c" * 2


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 10])
def test_bytes_that_are_not_whole_features_are_refused(size: int) -> None:
    with pytest.raises(IncompatibleMemory, match=f"have {size} bytes; expected a multiple of 4"):
        decode_features(bytes(size), 2)
