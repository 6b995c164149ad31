"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

EncoderOption = Annotated[
    str | None, typer.Option("--encoder", help="`lite`, `MODEL/PRETRAINED` of open_clip, or `MODEL@FILE`.")
]
BackendOption = Annotated[
    Literal["torch", "openvino", "onnx"] | None,
    typer.Option("--encoder-backend", help="What runs the image tower; all but torch are for CPUs."),
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Torch device; `auto` takes CUDA if there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


class StreamKind(StrEnum):
    """Kinds of orders, as `core.evaluation.stream_orders` has them; repeated here since that import takes seconds."""

    IID = "iid"
    RUNS = "runs"
    ZIPF = "zipf"
    DRIFT = "drift"


OrdersOption = Annotated[int | None, typer.Option("--orders", min=1, help="Orders to take the mean and the worst of.")]
KindOption = Annotated[
    StreamKind | None,
    typer.Option("--stream", help="Shuffled, in runs of one class, with frequencies like 1/rank, or drifting."),
]
MethodOption = Annotated[
    Literal["dmn", "auto"], typer.Option(help="`dmn` is the paper's; `auto` adds class statistics and calibration.")
]
TenantOption = Annotated[str, typer.Option(help="Whose memory.")]
UrlOption = Annotated[
    str | None, typer.Option("--url", help="Address of the service; by default that of DMN_HOST and DMN_PORT.")
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--key-file", help="File that holds an API key for it; without --url that of DMN_OPERATOR_KEY if left out."
    ),
]
