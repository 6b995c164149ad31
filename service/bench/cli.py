"""The commands of `dmn bench`, one a part; `service.bench` says what a part is.

A command imports its part when it runs, as torch takes seconds to import:

    @app.command()
    def readout(classes: ..., as_json: JsonOption = False, plot: PlotOption = None) -> None:
        from . import readout as part

        tell(part, lambda: part.measure(classes=classes), as_json=as_json, plot=plot)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from ..errors import InvalidRequest
from .telling import JsonOption, PlotOption, tell

MOST_AT_ONCE = 4096
"""Pictures in a batch."""

MOST_A_SECOND = 100_000
"""More calls a second than this client can make."""

Name = TypeVar("Name", bound=str)

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


@app.command()
def encode(
    encoder: Annotated[str, typer.Option(help="`lite`, `MODEL/PRETRAINED` of open_clip, or `MODEL@FILE`.")] = "lite",
    random: Annotated[
        str,
        typer.Option(metavar="MODEL", help="Instead: a model of open_clip's with random weights, such as ViT-B-32."),
    ] = "",
    backends: Annotated[str, typer.Option(metavar="A,B", help="What runs the image tower.")] = "torch,openvino,onnx",
    dtypes: Annotated[str, typer.Option(metavar="A,B", help="What it computes in.")] = "float32,bfloat16",
    batches: Annotated[str, typer.Option(metavar="1,8,32", help="Batch sizes.")] = "1,8,32",
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each batch size is measured, all in turns.")] = 20.0,
    device: Annotated[str, typer.Option(help="Torch device; `auto` takes CUDA if there is one.")] = "auto",
    as_json: JsonOption = False,  # noqa: FBT002
    plot: PlotOption = None,
) -> None:
    """Encode the same pictures by every backend in turns, and by open_clip's model as it comes."""
    from . import encode as part  # noqa: PLC0415 - as the docstring above says

    plan = part.Plan(
        encoder=encoder,
        random=random,
        backends=_chosen("backends", backends, part.BACKENDS),
        dtypes=_chosen("dtypes", dtypes, part.DTYPES),
        batches=_sizes(batches),
        seconds=seconds,
        device=device,
    )
    console = Console(stderr=True)
    tell(part, lambda: part.measure(plan, console), as_json=as_json, plot=plot)


def _chosen(option: str, text: str, known: Sequence[Name]) -> list[Name]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(known):
        raise InvalidRequest(f"--{option} takes some of {','.join(known)}; got {text!r}.")
    return [name for name in known if name in names]


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(one) for one in text.split(",") if one.strip()]
    except ValueError as error:
        raise InvalidRequest(f"--batches takes numbers separated by commas, such as 1,8,32; got {text!r}.") from error
    if not sizes or not all(0 < size <= MOST_AT_ONCE for size in sizes):
        raise InvalidRequest(f"--batches must be above 0 and at most {MOST_AT_ONCE:,}; got {text!r}.")
    return sizes


def _rates(text: str) -> list[float]:
    try:
        rates = [float(one) for one in text.split(",") if one.strip()]
    except ValueError as error:
        raise InvalidRequest(f"--rates takes numbers separated by commas, such as 1,2,5; got {text!r}.") from error
    if not all(0 < rate <= MOST_A_SECOND for rate in rates):
        raise InvalidRequest(f"--rates must be above 0 and at most {MOST_A_SECOND:,}; got {text!r}.")
    return rates
