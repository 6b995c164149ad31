"""What a run tells at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from service.bench.output import stamp


def tell(name: str, figures: Mapping[str, Any]) -> None:
    """Print the figures of a run, and where and when they were measured, as one JSON object to a run."""
    print("\n" + json.dumps({"run": name, **figures, **stamp()}))
