"""What the benchmarks have in common: figures are measured by the command line, and told as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from service.bench.output import stamp


def tell(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    *,
    absent: str | None = None,
) -> None:
    """Measure what the command line asks for, and print the figures; only why, if something is `absent`."""
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    told = {**({"skipped": absent} if absent else measure(options)), **stamp()}
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        print(told["skipped"] if absent else table(told))
