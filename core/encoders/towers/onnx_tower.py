"""Image towers by ONNX Runtime, on CPUs; no other file imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from .torch_tower import Tower

PACKAGES: tuple[str, ...] = ("onnxruntime", "onnx", "onnxscript")
"""What has to be installed; their versions are part of a kept tower's name."""

DTYPES: dict[torch.dtype, str] = {torch.float32: "float32"}
"""What it computes in on a CPU."""

_FILE = "tower.onnx"


def export(tower: nn.Module, example: UInt8[Tensor, "n 3 h w"], folder: Path) -> None:
    """Write a tower of any number of pictures to a folder."""
    batch = ({0: torch.export.Dim("batch")},)
    program: Any = torch.onnx.export(tower, (example,), dynamo=True, dynamic_shapes=batch, verbose=False)
    program.save(folder / _FILE, external_data=True)  # one file of protobuf ends at 2 GB


def load(folder: Path, *, dtype: torch.dtype, threads: int) -> Tower:  # noqa: ARG001 - there is only one
    """Return the tower that was written to a folder."""
    import onnxruntime  # noqa: PLC0415 - of the extra `cpu`

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait starve no others
    session: Any = onnxruntime.InferenceSession(folder / _FILE, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(pixels: UInt8[Tensor, "n 3 h w"]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: pixels.contiguous().numpy()})[0])

    return run
