from __future__ import annotations

import pytest
import torch

from core.codec import FEATURE_FORMAT, decode_feature, encode_feature
from core.errors import IncompatibleMemory


def test_bytes_are_little_endian_halves() -> None:
    assert FEATURE_FORMAT == "f16le"
    assert encode_feature(torch.tensor([1.0, -2.0])) == b"\x00\x3c\x00\xc0"


def test_bytes_become_a_half_precision_feature() -> None:
    got = decode_feature(b"\x00\x3c\x00\xc0", 2)
    assert got.dtype == torch.float16
    assert got.tolist() == [1.0, -2.0]


def test_a_decoded_feature_owns_its_memory() -> None:
    data = b"\x00\x3c"
    decode_feature(data, 1)[0] = 5.0
    assert data == b"\x00\x3c"


def test_a_feature_that_needs_a_gradient_is_encoded_too() -> None:
    assert encode_feature(torch.ones(1, requires_grad=True)) == b"\x00\x3c"


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x00\x3c\x00", b"\x00" * 6])
def test_bytes_of_another_size_are_refused(data: bytes) -> None:
    with pytest.raises(IncompatibleMemory, match=f"has {len(data)} bytes; expected 4"):
        decode_feature(data, 2)
