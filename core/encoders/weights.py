"""Where weights come from: a file, the cache of downloads, or the hub."""

from __future__ import annotations

import difflib
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip

from core.errors import EncoderUnavailable, reason

_PROBE_TIMEOUT_S = 5.0
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""What a repository of weights calls them when its entry names no file, in the order of preference."""


def parse_name(name: str) -> tuple[str, str, str]:
    """Return model, tag and file, of which the tag or the file may be empty."""
    source, at, file = name.partition("@")
    architecture, _, tag = source.partition("/")
    if not (tag or (at and file)):
        raise EncoderUnavailable(
            f"{name or 'An empty name'} was asked for, but an encoder is called MODEL/PRETRAINED, MODEL@FILE or lite; "
            "for example ViT-B-16/openai.",
        )
    known = open_clip.list_models()
    if architecture not in known:
        raise EncoderUnavailable(
            f"{name} was asked for, but open_clip knows no model {architecture!r}; {_nearest(architecture, known)}.",
        )
    return architecture, tag, file


def tag_settings(name: str, architecture: str, tag: str) -> dict[str, Any]:
    """Return open_clip's settings of published weights; EncoderUnavailable if it knows none."""
    settings = open_clip.get_pretrained_cfg(architecture, tag)
    if not settings:
        known = open_clip.list_pretrained_tags_by_model(architecture)
        raise EncoderUnavailable(
            f"{name} was asked for, but open_clip knows no weights {tag!r} of {architecture}; {_nearest(tag, known)}.",
        )
    return dict(settings)


def local_file(name: str, file: str) -> Path:
    """Return the path of a checkpoint; EncoderUnavailable if there is no such file."""
    path = Path(file).expanduser()
    if path.suffix not in _SUFFIXES:
        raise EncoderUnavailable(
            f"{name} was asked for, but {path.name} is no checkpoint; give a file that ends in {', '.join(_SUFFIXES)}.",
        )
    if not path.is_file():
        raise EncoderUnavailable(
            f"{name} was asked for, but there is no file {path}; check the path and that it is mounted and readable.",
        )
    return path


def download(name: str, settings: Mapping[str, Any]) -> Path:
    """Return the file of published weights, downloaded if need be; EncoderUnavailable if that fails."""
    cached = _cached(str(settings.get("hf_hub", "")))
    if cached:
        return cached
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        _probe(endpoint)
        return Path(open_clip.download_pretrained(settings))
    except Exception as error:
        raise EncoderUnavailable(
            f"{name} was asked for, but its weights are not in the cache and cannot be downloaded from {endpoint} "
            f"({reason(error)}); give the file ({name}@FILE), name a mirror with HF_ENDPOINT, or use lite.",
        ) from error


def _cached(location: str) -> Path | None:
    """Return the weights' file in the hub's cache; looked up first, since pinned weights need no network."""
    repository, _, filename = location.rpartition("/")
    for candidate in (filename,) if filename else _WEIGHT_FILES:
        found = huggingface_hub.try_to_load_from_cache(repository, candidate) if repository else None
        if isinstance(found, str):
            return Path(found)
    return None


def _probe(endpoint: str) -> None:
    """Return if somebody answers at `endpoint`: the hub's client would try for most of a minute before it gives up.

    Raises:
        OSError: nobody answers.
    """
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 - the operator's own setting
    try:
        urllib.request.urlopen(request, timeout=_PROBE_TIMEOUT_S).close()  # noqa: S310 - as above
    except urllib.error.HTTPError as answer:
        answer.close()  # an answer all the same


# ---------------------------------------------------------------------------------------------------- sentences


def _nearest(wrong: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=3, cutoff=0.4) or list(known[:3])
    return f"near it are {', '.join(close)}" if close else "it has weights from a file only: MODEL@FILE"
