from __future__ import annotations

import json
import logging
import urllib.error
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from core.encoders import fingerprint, openclip, weights
from core.encoders.protocol import Encoder
from core.encoders.towers.backends import Backend, Runtime
from core.encoders.towers.torch_tower import PixelTower
from core.errors import EncoderUnavailable

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def original(model: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with openclip._quiet():
        return open_clip.create_model(model).eval()


def save(model: nn.Module, path: Path) -> str:
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    paths, configs = list(open_clip.factory._MODEL_CONFIG_PATHS), dict(open_clip.factory._MODEL_CONFIGS)
    open_clip.add_model_config(folder)
    yield "tiny-clip"
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(configs)


@pytest.fixture(scope="module")
def model(tiny: str) -> nn.Module:
    return original(tiny)


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(model, tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def encoder(tiny: str, file: str) -> openclip.OpenClipEncoder:
    return openclip.load(f"{tiny}@{file}")


def pixels(n: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def their_preprocessing(model: nn.Module, picture: torch.Tensor) -> torch.Tensor:
    cfg = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
    return open_clip.transform.image_transform_v2(cfg, is_train=False)(image)


def test_a_loaded_checkpoint_is_an_encoder(encoder: openclip.OpenClipEncoder, tiny: str, file: str) -> None:
    held: Encoder = encoder
    assert held.name == f"{tiny}@{file}"
    assert held.dim == 16
    assert held.device == torch.device("cpu")
    assert held.preprocess.size == 32
    assert held.preprocess.interpolation == "bicubic"
    assert held.preprocess.resize_mode == "shortest"


def test_image_features_are_the_original_models(encoder: openclip.OpenClipEncoder, model: nn.Module) -> None:
    batch = pixels(3)
    with torch.inference_mode():
        expected = model.encode_image(torch.stack([their_preprocessing(model, p) for p in batch]), normalize=True)
    torch.testing.assert_close(encoder.encode_images(batch), expected.clone(), atol=1e-6, rtol=0)


def test_uint8_is_normalised_as_open_clip_does(encoder: openclip.OpenClipEncoder, model: nn.Module) -> None:
    picture = pixels(1)[0]
    expected = their_preprocessing(model, picture)
    found = PixelTower(model.visual, encoder.preprocess).normalised(picture[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "onnx"])
def test_another_backend_gives_the_same_features_under_the_same_fingerprint(
    backend: Backend, encoder: openclip.OpenClipEncoder, tmp_path: Path
) -> None:
    with torch.inference_mode():  # as the worker's thread is
        other = openclip.load(encoder.name, runtime=Runtime(backend=backend, cache=tmp_path))
    assert other.fingerprint == encoder.fingerprint
    torch.testing.assert_close(other.encode_images(pixels(11)), encoder.encode_images(pixels(11)), atol=1e-5, rtol=0)
    assert torch.equal(other.encode_texts(["a"]), encoder.encode_texts(["a"]))
    assert other.encode_images(pixels(0)).shape == (0, 16)


def test_text_features_are_the_original_models(encoder: openclip.OpenClipEncoder, model: nn.Module, tiny: str) -> None:
    texts = ["a photo of a cat.", "art of the tree."]
    with torch.inference_mode():
        expected = model.encode_text(open_clip.get_tokenizer(tiny)(texts), normalize=True)
    torch.testing.assert_close(encoder.encode_texts(texts), expected.clone(), atol=1e-6, rtol=0)


def test_logit_scale_is_the_multiplier(encoder: openclip.OpenClipEncoder, model: nn.Module) -> None:
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))


def test_features_are_float32_of_unit_norm(encoder: openclip.OpenClipEncoder) -> None:
    for features in (encoder.encode_images(pixels(2)), encoder.encode_texts(["a", "b"])):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_nothing_in_is_nothing_out(encoder: openclip.OpenClipEncoder) -> None:
    assert encoder.encode_images(pixels(0)).shape == (0, 16)
    assert encoder.encode_texts([]).shape == (0, 16)


def test_texts_beyond_one_chunk_keep_their_order(encoder: openclip.OpenClipEncoder) -> None:
    texts = [f"thing number {i}" for i in range(300)]
    torch.testing.assert_close(encoder.encode_texts(texts)[290:], encoder.encode_texts(texts[290:]))


def test_fingerprint_is_the_weights_not_the_place(
    encoder: openclip.OpenClipEncoder, model: nn.Module, tiny: str, tmp_path: Path
) -> None:
    copy = openclip.load(f"{tiny}@{save(model, tmp_path / 'elsewhere.safetensors')}")
    assert copy.fingerprint == encoder.fingerprint
    assert len(copy.fingerprint) == 64


def test_fingerprint_is_the_same_in_every_process() -> None:
    # Of a fixed state, and as an earlier process wrote it.
    state = {"b": torch.arange(3.0), "a": torch.ones(2, dtype=torch.bfloat16)}
    pre = openclip.Preprocess(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    expected = "0100050a0a153d7bc8247c862b3418bf73777c438fa91b7f40324319512cf3e5"
    assert fingerprint.fingerprint_of(fingerprint.origin_of("m", state, pre, 4)) == expected
    assert fingerprint.fingerprint_of(fingerprint.origin_of("m", dict(sorted(state.items())), pre, 4)) == expected


def test_fingerprint_changes_with_one_weight(
    encoder: openclip.OpenClipEncoder, model: nn.Module, tiny: str, tmp_path: Path
) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["visual.proj"][0, 0] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    assert openclip.load(f"{tiny}@{tmp_path / 'other.safetensors'}").fingerprint != encoder.fingerprint


def test_fingerprint_changes_with_preprocessing_architecture_and_size() -> None:
    state = {"a": torch.ones(2)}
    pre = openclip.Preprocess(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    other = openclip.Preprocess(size=8, mean=(0.0, 0.0, 0.1), std=(1.0, 1.0, 1.0))
    found = [("m", pre, 4), ("m", other, 4), ("n", pre, 4), ("m", pre, 5)]
    assert (
        len({fingerprint.fingerprint_of(fingerprint.origin_of(name, state, how, dim)) for name, how, dim in found}) == 4
    )


def test_a_plain_torch_checkpoint_loads_too(
    encoder: openclip.OpenClipEncoder, model: nn.Module, tiny: str, tmp_path: Path
) -> None:
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    assert openclip.load(f"{tiny}@{tmp_path / 'tiny.pt'}").fingerprint == encoder.fingerprint


class Explosive:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was run",))


def test_a_pickle_is_refused_and_not_run(tiny: str, tmp_path: Path) -> None:
    torch.save({"state_dict": Explosive()}, tmp_path / "evil.pt")
    with pytest.raises(EncoderUnavailable, match=r"evil\.pt does not load as tiny-clip"):
        openclip.load(f"{tiny}@{tmp_path / 'evil.pt'}")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ViT-B-61/openai", r"open_clip knows no model 'ViT-B-61'; near it are ViT-B-16"),
        ("ViT-B-16/opanai", r"open_clip knows no weights 'opanai' of ViT-B-16; near it are openai"),
        ("ViT-B-16@/nowhere/file.safetensors", r"there is no file /nowhere/file\.safetensors; check the path"),
        ("ViT-B-16@/etc/passwd", r"passwd is no checkpoint; give a file that ends in \.safetensors"),
        ("ViT-B-16", r"an encoder is called MODEL/PRETRAINED, MODEL@FILE or lite"),
        ("", r"an encoder is called MODEL/PRETRAINED, MODEL@FILE or lite"),
        ("ViT-B-16@", r"an encoder is called MODEL/PRETRAINED, MODEL@FILE or lite"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(EncoderUnavailable, match=sentence) as caught:
        openclip.load(name)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_model_is_refused(file: str) -> None:
    with pytest.raises(EncoderUnavailable, match=r"does not load as ViT-B-32 .* name the model") as caught:
        openclip.load(f"ViT-B-32@{file}")
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_refused(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(EncoderUnavailable, match=r"broken\.safetensors does not load as tiny-clip"):
        openclip.load(f"{tiny}@{tmp_path / 'broken.safetensors'}")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(weights.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(weights.huggingface_hub, "try_to_load_from_cache", lambda *_: None)


@pytest.mark.usefixtures("no_network")
def test_without_a_network_a_download_fails_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_: pytest.fail("tried to download"))
    with pytest.raises(EncoderUnavailable, match=r"no route to host.*ViT-B-16/openai@FILE.*mirror.*lite") as caught:
        openclip.load("ViT-B-16/openai")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_cached_weights_need_no_network(
    tiny: str, file: str, encoder: openclip.OpenClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"hf_hub": "org/tiny/"})
    monkeypatch.setattr(weights.huggingface_hub, "try_to_load_from_cache", lambda *_: file)
    assert openclip.load(f"{tiny}/tag").fingerprint == encoder.fingerprint


def test_a_tag_brings_its_preprocessing_and_activation(
    tiny: str, file: str, encoder: openclip.OpenClipEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"hf_hub": "org/tiny/", "mean": (0.5, 0.5, 0.5), "quick_gelu": True}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: settings)
    tagged = openclip.load(f"{tiny}/tag@{file}")
    assert tagged.preprocess.mean == (0.5, 0.5, 0.5)
    assert tagged.fingerprint != encoder.fingerprint
    assert not torch.equal(tagged.encode_images(pixels(1)), encoder.encode_images(pixels(1)))


def test_loading_leaves_the_terminal_and_the_loggers_alone(
    tiny: str, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger()
    before = (list(logger.handlers), list(logger.filters), logger.level)
    openclip.load(f"{tiny}@{file}")
    assert (list(logger.handlers), list(logger.filters), logger.level) == before
    assert capfd.readouterr() == ("", "")


def test_quiet_hides_only_what_it_wraps(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with openclip._quiet():
        warnings.warn("noise", UserWarning, stacklevel=1)
        logging.warning("noise")  # noqa: LOG015 - as open_clip does
        logging.getLogger("dmn").warning("ours")
    assert [record.message for record in caplog.records] == ["ours"]
    assert capfd.readouterr().err == ""
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)
