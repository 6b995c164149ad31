"""Encoders, all of them through open_clip; no other file imports it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from core.encoders.towers.backends import Runtime, check_possible, image_tower, sample
from core.encoders.towers.torch_tower import PixelTower, Tower
from core.errors import EncoderUnavailable, reason
from core.numerics import unit

from . import lite
from .fingerprint import fingerprint_of, origin_of, preprocess_of
from .protocol import Preprocess
from .weights import download, local_file, parse_name, tag_settings

_TEXT_CHUNK = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OpenClipEncoder:
    """A frozen open_clip model behind the `Encoder` protocol. Its encode methods belong to one worker thread."""

    name: str
    fingerprint: str
    origin: Mapping[str, str]
    dim: int
    logit_scale: float
    preprocess: Preprocess
    device: torch.device
    _model: Any = field(repr=False)  # a module whose methods open_clip does not type; its image tower is `_tower`
    _tokenize: Callable[[list[str]], Tensor] = field(repr=False)
    _tower: Tower = field(repr=False)
    _most: int

    @torch.inference_mode()
    def encode_images(self, pixels: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return unit-norm float32 features on `device`; the uint8 pixels travel there before they are normalised."""
        empty = torch.zeros(0, self.dim, device=self.device)
        parts = (part for part in pixels.split(self._most) if len(part))
        return torch.cat([empty, *(unit(self._tower(part).to(torch.float32)) for part in parts)])

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Return unit-norm float32 features on `device`, (0, D) for no texts."""
        empty = torch.zeros(0, self.dim, device=self.device)
        starts = range(0, len(texts), _TEXT_CHUNK)
        return torch.cat([empty, *(self._encode_chunk(list(texts[i : i + _TEXT_CHUNK])) for i in starts)])

    def _encode_chunk(self, texts: list[str]) -> Float[Tensor, "n d"]:
        tokens = _without_padding(self._model, self._tokenize(texts))
        return unit(self._model.encode_text(tokens.to(self.device)).to(torch.float32))


def load(name: str, *, device: torch.device | str = "cpu", runtime: Runtime | None = None) -> OpenClipEncoder:
    """Return the encoder called `name`.

    Args:
        name: `lite`; `MODEL/PRETRAINED` with open_clip's names, downloaded unless it is in the cache; or `MODEL@FILE`,
            a checkpoint of that model. `MODEL/PRETRAINED@FILE` reads the file with the preprocessing and the activation
            that open_clip keeps for PRETRAINED: the way to load a mirrored file.
        device: where the towers live.
        runtime: how the image tower is run; by torch if left out.

    Raises:
        EncoderUnavailable: there is no such model, weight or file, it does not fit, or it cannot be downloaded; or its
            image tower cannot be run so.
    """
    device, runtime = torch.device(device), runtime or Runtime()
    check_possible(runtime, device)
    # Whoever calls may be in inference mode, whose tensors cannot be exported.
    with _quiet(), torch.inference_mode(mode=False), torch.no_grad():
        architecture, model, tokenize = _read(name, device)
        preprocess = preprocess_of(model)
        inputs = PixelTower(model.visual, preprocess).normalised(sample(preprocess.size).to(device))
        reference = unit(model.encode_image(inputs))
        origin = origin_of(architecture, model.state_dict(), preprocess, reference.shape[1])
        fingerprint = fingerprint_of(origin)
        tower = image_tower(model.visual, preprocess, reference, fingerprint, runtime, device)
        model.visual = nn.Identity()  # what is still needed of it, the tower holds
    return OpenClipEncoder(
        name=name,
        fingerprint=fingerprint,
        origin=origin,
        dim=reference.shape[1],
        logit_scale=float(model.logit_scale.exp()),
        preprocess=preprocess,
        device=device,
        _model=model,
        _tokenize=tokenize,
        _tower=tower,
        _most=runtime.batch(device),
    )


def plain(
    name: str, *, device: torch.device | str = "cpu"
) -> Callable[[Float[Tensor, "n 3 h w"]], Float[Tensor, "n d"]]:
    """Return open_clip's own way from normalised pictures to unit-norm float32 features: what others are held against.

    Raises:
        EncoderUnavailable: the model cannot be had.
    """
    with _quiet(), torch.inference_mode(mode=False):
        _, model, _ = _read(name, torch.device(device))
    return partial(model.encode_image, normalize=True)


def write_random(architecture: str, file: Path) -> str:
    """Write a checkpoint of random weights, which cost as much time as trained ones, and return its encoder's name.

    Raises:
        EncoderUnavailable: open_clip knows no such model.
    """
    name = f"{architecture}@{file}"
    parse_name(name)
    torch.manual_seed(0)
    with _quiet():
        model = open_clip.create_model(architecture, pretrained_text=False)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    return name


# ------------------------------------------------------------------------------------------------ the three kinds


def _read(name: str, device: torch.device) -> tuple[str, Any, Any]:
    """Return a model's architecture, the evaluated model on its device, and its tokenizer."""
    architecture, model, tokenize = _lite() if name == "lite" else _pretrained(name)
    return architecture, model.eval().requires_grad_(requires_grad=False).to(device), tokenize


def _lite() -> tuple[str, Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(lite.config()))
        try:
            # The text tower's weights come with its folder; the image tower's and the projections follow.
            model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=True)
            tokenize = open_clip.tokenizer.HFTokenizer(str(lite.text_folder()), context_length=256)
        except Exception as error:
            raise EncoderUnavailable(
                f"lite was asked for, but its towers do not load ({reason(error)}); "
                "install them anew with: pip install --force-reinstall 'dmn-clip-service[lite]'.",
            ) from error
    trunk = model.visual.trunk
    trunk.load_state_dict(lite.image_weights(trunk.state_dict()))
    model.load_state_dict(lite.projections(), strict=False)
    return "lite", model, tokenize


def _pretrained(name: str) -> tuple[str, Any, Any]:
    architecture, tag, file = parse_name(name)
    settings = tag_settings(name, architecture, tag) if tag else {}
    checkpoint = local_file(name, file) if file else download(name, settings)
    if not os.access(checkpoint, os.R_OK):
        raise EncoderUnavailable(
            f"{name} was asked for, but the user that this runs as may not read {checkpoint}; change who may."
        )
    quick = bool(settings.get("quick_gelu", False))
    try:
        model = open_clip.create_model(
            architecture,
            str(checkpoint),
            force_quick_gelu=quick,
            force_preprocess_cfg=settings,
            pretrained_text=False,
        )
        tokenize = open_clip.get_tokenizer(architecture)
    except Exception as error:
        raise EncoderUnavailable(
            f"{name} was asked for, but {checkpoint} does not load as {architecture} ({reason(error)}); "
            "name the model that the file was saved from, in safetensors or as plain tensors.",
        ) from error
    # The activation is not in the weights, yet features depend on it.
    suffix = "-quickgelu" if quick and not architecture.endswith("-quickgelu") else ""
    return architecture + suffix, model, tokenize


def _without_padding(model: nn.Module, tokens: Int[Tensor, "n t"]) -> Int[Tensor, "n s"]:
    """Return the tokens without columns that are padding in every row, where the tower masks padding anyway.

    Sentences fill a tenth of the context, and attention over the rest is most of the work.
    """
    pad = getattr(getattr(getattr(model, "text", None), "config", None), "pad_token_id", None)
    if pad is None:
        return tokens
    used = (tokens != pad).any(dim=0).nonzero()
    return tokens[:, : int(used.max()) + 1] if len(used) else tokens[:, :1]


class _Hush(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        del record
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's, transformers' and the hub's notices, warnings and progress bars off the terminal.

    open_clip logs on the root logger, whose first record would also install a handler for good; the filter stops its
    records and nobody else's, since a logger's filter does not see what its children pass up.
    """
    root, hush, handler = logging.getLogger(), _Hush(), logging.NullHandler()
    others = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "timm")]
    levels = [logger.level for logger in others]
    root.addFilter(hush)
    root.addHandler(handler)
    for logger in others:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        root.removeFilter(hush)
        root.removeHandler(handler)
        for logger, level in zip(others, levels, strict=True):
            logger.setLevel(level)
