"""Which library runs an image tower, and in which precision; one that changes the features is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from core.encoders.protocol import Preprocess
from core.errors import EncoderUnavailable
from core.numerics import unit

from .cuda_tower import CudaTower
from .export_cache import LIBRARIES, check_installed, kept_tower
from .simplify import make_leaner
from .torch_tower import PixelTower, Tower

Backend: TypeAlias = Literal["torch", "openvino", "onnx"]
Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

AGREEMENT = 0.9999
"""Least cosine of a feature to the plain model's in float32, whatever computed it.

Slots are kept in half precision, and the last digits differ with the size of a batch anyway; two features this near
move a class's score by hundredths of a logit. So how a feature was computed is no part of the fingerprint: memories
outlive a change of backend, and services that differ in it share them.
"""

_CPU_BATCH = 16
"""A CPU is hardly faster for more at once, and would hold all their activations."""

_PICTURES = 4
_PATCHES = (2, 4, 8, 16, 32, 64, 128)
"""Patches a side, of the pictures on which towers have to agree."""

_OFTEN_BFLOAT16 = "Intel since Sapphire Rapids, AMD since Zen 4"


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """How an image tower is run.

    `dtype` is what it computes in: `auto` is float32 on a CPU, and on a GPU float16 if that passes, else float32.
    It passes on most models and bfloat16 does not on many, having eight bits of a number where float16 has eleven.
    `cache` is the folder where a backend keeps what it exported; torch needs none. At most `most` pictures go through a
    GPU at once. `notice` is told of what works, but not as it should.
    """

    backend: Backend = "torch"
    dtype: Precision = "auto"
    cache: Path | None = None
    most: int = 32
    notice: Callable[[str], None] = lambda _: None

    def batch(self, device: torch.device) -> int:
        """Return how many pictures go through a device at once."""
        return min(self.most, _CPU_BATCH) if device.type == "cpu" else self.most


def check_possible(runtime: Runtime, device: torch.device) -> None:
    """Return if a tower can be run so here: asked before minutes are spent on its weights.

    Raises:
        EncoderUnavailable: a package is missing, or the backend or the processor cannot do it.
    """
    backend, dtype, cpu = runtime.backend, runtime.dtype, device.type == "cpu"
    if backend != "torch":
        if not cpu:
            raise EncoderUnavailable(
                f"The encoder backend {backend} is for CPUs, but the device is {device}; choose the backend torch."
            )
        check_installed(backend)
    if cpu and dtype == "float16":
        raise EncoderUnavailable("The encoder computes in float16 on GPUs only; choose float32 or bfloat16 here.")
    if dtype == "bfloat16" and backend != "torch" and torch.bfloat16 not in LIBRARIES[backend].DTYPES:
        raise EncoderUnavailable(
            f"The encoder backend {backend} computes in float32 only; choose openvino or torch for bfloat16."
        )
    if dtype == "bfloat16" and not _has_bfloat16(device):
        raise EncoderUnavailable(
            f"This processor has no instructions for bfloat16 ({_OFTEN_BFLOAT16} have them); choose float32."
        )


def image_tower(
    visual: nn.Module,
    preprocess: Preprocess,
    reference: Float[Tensor, "n d"],
    fingerprint: str,
    runtime: Runtime,
    device: torch.device,
) -> Tower:
    """Return a model's image tower, run as asked for; `visual` itself may be changed on the way.

    Args:
        visual: an evaluated float32 tower on `device`.
        preprocess: its preprocessing.
        reference: unit-norm features of `sample`, as the plain model gives them in float32.
        fingerprint: of the model, under which a backend keeps what it exported.
        runtime: how it is run.
        device: where it lives.

    Raises:
        EncoderUnavailable: it cannot be run so, or its features would not be the model's.
    """
    pictures = sample(preprocess.size)
    plain = PixelTower(visual, preprocess)
    make_leaner(visual, plain.normalised(pictures.to(device)))

    def check(tower: Tower) -> None:
        found = torch.cat([tower(part) for part in pictures.split(runtime.batch(device))])
        _check_agreement(unit(found.to(torch.float32)), reference, runtime)

    if runtime.backend != "torch":
        dtype = torch.bfloat16 if runtime.dtype == "bfloat16" else torch.float32
        if runtime.cache is None:
            raise ValueError("A backend that exports needs a folder to keep towers in.")
        return kept_tower(runtime.backend, plain, pictures, fingerprint, folder=runtime.cache, dtype=dtype, check=check)
    if runtime.dtype == "auto" and device.type == "cuda":
        try:
            return _by_torch(visual, preprocess, torch.float16, runtime, device, check)
        except EncoderUnavailable as error:
            runtime.notice(f"float32 instead of float16: {error}")
    dtype = torch.float32 if runtime.dtype == "auto" else getattr(torch, runtime.dtype)
    return _by_torch(visual, preprocess, dtype, runtime, device, check)


def sample(size: int) -> UInt8[Tensor, "n 3 h w"]:
    """Return the few pictures on which towers have to agree: patches of all sizes, the large ones strongest.

    As in photographs, so that a cosine on them says what to expect there; pictures of plain noise are far harsher.
    """
    generator = torch.Generator().manual_seed(0)
    layers = (torch.rand(_PICTURES, 3, side, side, generator=generator) / side**0.5 for side in _PATCHES)
    mixed = torch.stack([nn.functional.interpolate(layer, (size, size), mode="bilinear") for layer in layers]).sum(0)
    low, high = (mixed.flatten(1).aminmax(dim=1)[end][:, None, None, None] for end in (0, 1))
    return ((mixed - low) / (high - low) * 255).to(torch.uint8)


def _by_torch(
    visual: nn.Module,
    preprocess: Preprocess,
    dtype: torch.dtype,
    runtime: Runtime,
    device: torch.device,
    check: Callable[[Tower], None],
) -> Tower:
    """Return a torch tower in a precision; one of its own where that is not the model's, which stays whole."""
    own = visual if dtype == torch.float32 else copy.deepcopy(visual).to(dtype)
    module = PixelTower(own, preprocess, channels_last=True)
    tower = CudaTower(module, preprocess, device, runtime.most, runtime.notice) if device.type == "cuda" else module
    check(tower)
    return tower


def _check_agreement(features: Float[Tensor, "n d"], reference: Float[Tensor, "n d"], runtime: Runtime) -> None:
    cosine = float((features * reference).sum(1).min())
    if math.isnan(cosine) or cosine < AGREEMENT:
        raise EncoderUnavailable(
            f"By the backend {runtime.backend} in {runtime.dtype} the encoder's features have a cosine of "
            f"{cosine:.5f} to the model's; at least {AGREEMENT} is asked for. Choose the precision float32, or the "
            "backend torch."
        )


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot tell
    return any(there for name, there in known.items() if name.endswith("bf16"))
