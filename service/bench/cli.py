"""The commands of `dmn bench`, one a part; `service.bench` says what a part is.

A command imports its part when it runs, as torch takes seconds to import:

    @app.command()
    def readout(classes: ..., as_json: JsonOption = False, plot: PlotOption = None) -> None:
        from . import readout as part

        tell(part, lambda: part.measure(classes=classes), as_json=as_json, plot=plot)
"""

from __future__ import annotations

import typer

app = typer.Typer(help="Measure how fast things are here, side by side.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure how fast things are here, side by side."""
