"""Image towers by OpenVINO, on CPUs; no other file imports it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from .torch_tower import Tower

PACKAGES: tuple[str, ...] = ("openvino",)
"""What has to be installed; their versions are part of a kept tower's name."""

DTYPES: dict[torch.dtype, str] = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""What it computes in, and how it is told so. Left alone it would choose bfloat16 wherever that is fast."""

_FILE = "tower.xml"


def export(tower: nn.Module, example: UInt8[Tensor, "n 3 h w"], folder: Path) -> None:
    """Write a tower of any number of pictures to a folder."""
    openvino = _openvino()
    shape = openvino.PartialShape([-1, *example.shape[1:]])
    model = openvino.convert_model(tower, example_input=example, input=[shape])
    openvino.save_model(model, folder / _FILE, compress_to_fp16=False)


def load(folder: Path, *, dtype: torch.dtype, threads: int) -> Tower:
    """Return the tower that was written to a folder; it belongs to one thread at a time."""
    settings = {
        "INFERENCE_PRECISION_HINT": DTYPES[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # the cores are shared with the threads that decode, and with other processes
    }
    request = _openvino().Core().compile_model(folder / _FILE, "CPU", settings).create_infer_request()

    def run(pixels: UInt8[Tensor, "n 3 h w"]) -> Tensor:
        found = request.infer({0: pixels.contiguous().numpy()}, share_inputs=True)
        return torch.from_numpy(found[0])

    return run


def _openvino() -> Any:
    """Return the library, without what it would tell its makers of every import: a missing module makes it silent."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # how one is said to be missing
    return importlib.import_module("openvino")
