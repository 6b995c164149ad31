"""The commands of `dmn bench`, one a part; `service.bench` says what a part is.

A command imports its part when it runs, as torch takes seconds to import:

    @app.command()
    def readout(classes: ..., as_json: JsonOption = False, plot: PlotOption = None) -> None:
        from . import readout as part

        tell(part, lambda: part.measure(classes=classes), as_json=as_json, plot=plot)
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import InvalidRequest
from .telling import JsonOption, PlotOption, tell

MOST_A_SECOND = 100_000
"""More calls a second than this client can make."""

app = typer.Typer(help="Measure how fast things are here, side by side.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure how fast things are here, side by side."""


@app.command()
def serve(
    url: Annotated[str | None, typer.Option(help="Address of a running service; without it one is started.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Encoder of the service that is started.")] = None,
    store: Annotated[str | None, typer.Option(help="Its store.")] = None,
    device: Annotated[str | None, typer.Option(help="Its torch device.")] = None,
    rates: Annotated[
        str, typer.Option(metavar="1,2,5", help="Calls a second to offer; shares of what it can do if left out.")
    ] = "",
    seconds: Annotated[float, typer.Option(min=1, help="How long each rate is offered.")] = 10.0,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures to post; JPEGs of 227 x 227 are made if left out.")
    ] = None,
    learn: Annotated[bool, typer.Option(help="Let the memory take the images.")] = True,  # noqa: FBT002
    seed: Annotated[int, typer.Option(min=0, help="Seed of the arrivals.")] = 0,
    as_json: JsonOption = False,  # noqa: FBT002
    plot: PlotOption = None,
) -> None:
    """Ask a service at fixed rates, whatever it answers, and measure how long callers wait."""
    from . import serve as part  # noqa: PLC0415 - as the docstring above says

    options = {"--encoder": encoder, "--store": store, "--device": device}
    serving = [word for name, value in options.items() if value is not None for word in (name, value)]
    if url is not None and serving:
        raise InvalidRequest(f"The service at {url} has its own encoder, store and device; leave out {serving[0]}.")
    plan = part.Plan(rates=_rates(rates), seconds=seconds, learn=learn, seed=seed)
    console = Console(stderr=True)
    tell(part, lambda: part.measure(plan, url, serving, images, console), as_json=as_json, plot=plot)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(one) for one in text.split(",") if one.strip()]
    except ValueError as error:
        raise InvalidRequest(f"--rates takes numbers separated by commas, such as 1,2,5; got {text!r}.") from error
    if not all(0 < rate <= MOST_A_SECOND for rate in rates):
        raise InvalidRequest(f"--rates must be above 0 and at most {MOST_A_SECOND:,}; got {text!r}.")
    return rates
