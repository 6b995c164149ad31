"""The command `dmn` as it is, but that it knows one more encoder, `null`: `python -m tests.bench.launch serve ...`."""

from __future__ import annotations

import sys

import torch

from core import openclip
from core.encoder import Encoder
from service.cli import main
from tests.bench.null import NullEncoder

_load = openclip.load


def load(name: str, *, device: torch.device) -> Encoder:
    """Return the encoder of that name."""
    return NullEncoder() if name == NullEncoder.name else _load(name, device=device)


if __name__ == "__main__":
    openclip.load = load
    sys.argv[0] = "dmn"
    main()
