"""The command `dmn` as it is, but that it knows one more encoder: `python -m tests.bench.launch serve --encoder null`.

`null:80` has a device that takes 80 ms a batch.
"""

from __future__ import annotations

import sys
from typing import Any

from core.encoders import openclip
from core.encoders.protocol import Encoder
from service.cli.main import main
from tests.bench.null import NullEncoder

_load = openclip.load


def load(name: str, **how: Any) -> Encoder:
    """Return the encoder of that name."""
    kind, _, device_ms = name.partition(":")
    return NullEncoder(float(device_ms or 0) / 1000) if kind == NullEncoder.name else _load(name, **how)


if __name__ == "__main__":
    openclip.load = load
    sys.argv[0] = "dmn"
    main()
