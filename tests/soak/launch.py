"""The command `dmn` as it is, but for its encoder: one without weights, which sees colours."""

from __future__ import annotations

import sys

from core import openclip
from core.encoder import Encoder
from service.cli import main
from tests.support.fakes import FakeEncoder


def _load(*_: object, **__: object) -> Encoder:
    return FakeEncoder()


if __name__ == "__main__":
    openclip.load = _load  # type: ignore[assignment]
    sys.argv[0] = "dmn"
    main()
