"""From a measurement to what is told of it: the stamp of the machine, a table or JSON, and a plot."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.table import Table

from service.errors import InvalidRequest

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the figures; needs the extra `report`.")
]

_CPUINFO = Path("/proc/cpuinfo")


class Absent(Exception):
    """What is to be measured needs a device or a package that is not here; the message says which."""


class Part(Protocol):
    """What a module of this package has beside `measure`."""

    def table(self, told: dict[str, Any], /) -> Table:
        """Return the figures for people."""

    def draw(self, told: dict[str, Any], axes: Any, /) -> None:
        """Draw the figures on matplotlib's axes."""


def tell(part: Part, measure: Callable[[], dict[str, Any]], *, as_json: bool, plot: Path | None) -> None:
    """Measure and tell the figures; what is absent is told as `{"skipped": why}`.

    Raises:
        InvalidRequest: the plot has no place, or cannot be drawn here.
    """
    if plot is not None:
        _check_plot(plot)
    try:
        figures = measure()
    except Absent as absent:
        figures = {"skipped": str(absent)}
    told = {**figures, **stamp()}
    if plot is not None and "skipped" not in told:
        _draw(part, told, plot)
    if as_json:
        sys.stdout.write(json.dumps(told, ensure_ascii=False, indent=2) + "\n")
    elif "skipped" in told:
        Console().print(f"Not measured: {told['skipped']}", highlight=False, markup=False, soft_wrap=True)
    else:
        Console().print(part.table(told))


def stamp() -> dict[str, Any]:
    """Return where, when and how figures were measured."""
    import torch  # noqa: PLC0415 - takes seconds to import; the command line need not wait

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    machine = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **gpu,
    }
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"machine": machine, "date": datetime.now(UTC).date().isoformat(), "command": command}


def _processor() -> str:
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _check_plot(file: Path) -> None:
    """Return if a plot can be written there: asked before minutes are spent on what to draw."""
    if file.suffix.lower() != ".png":
        raise InvalidRequest(f"A plot is a PNG file; name it with .png at its end: {file}")
    if not file.parent.is_dir() or file.is_dir():
        raise InvalidRequest(f"The plot {file} has no place: name a file in a folder that is there.")
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise InvalidRequest(
            "A plot is drawn with matplotlib, which is not installed; pip install 'dmn-clip-service[report]'."
        ) from error


def _draw(part: Part, told: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415 - only who wants a plot needs it

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    part.draw(told, axes)
    axes.grid(alpha=0.3)
    figure.savefig(file, format="png")
