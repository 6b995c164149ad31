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

from service.bench.output import JsonOption, PlotOption, tell
from service.errors import InvalidRequest

MOST_AT_ONCE = 4096
"""Pictures in a batch."""

MOST_A_SECOND = 100_000
"""More calls a second than this client can make."""

Name = TypeVar("Name", bound=str)

MOST_CLASSES, MOST_TENANTS = 10_000, 100_000
"""More than a tenant may have, and than fit into memory."""

MOST_PLANNED = 10_000_000
"""Devices, or tenants, of a fleet."""

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
    from service.bench import serve as part  # noqa: PLC0415 - as the docstring above says

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
    from service.bench import encode as part  # noqa: PLC0415 - as the docstring above says

    plan = part.Plan(
        encoder=encoder,
        random=random,
        backends=_chosen("backends", backends, part.BACKENDS),
        dtypes=_chosen("dtypes", dtypes, part.DTYPES),
        batches=_sizes("batches", batches, MOST_AT_ONCE),
        seconds=seconds,
        device=device,
    )
    console = Console(stderr=True)
    tell(part, lambda: part.measure(plan, console), as_json=as_json, plot=plot)


@app.command()
def readout(
    classes: Annotated[int, typer.Option(min=1, max=MOST_CLASSES)] = 1000,
    slots: Annotated[int, typer.Option(min=1, help="Filled dynamic slots of each class.")] = 50,
    shots: Annotated[int, typer.Option(min=0, help="Labelled shots of each class.")] = 0,
    dim: Annotated[int, typer.Option(min=1, help="Entries of a feature.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Images read together.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 leaves it its own choice.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is measured, but for those that take long.")] = 15,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the features.")] = 0,
    as_json: JsonOption = False,  # noqa: FBT002
    plot: PlotOption = None,
) -> None:
    """Read a full memory, and measure how long that takes beside plainer forms of the same."""
    from service.bench import readout as part  # noqa: PLC0415 - as the docstring above says

    problem = part.Problem(classes=classes, slots=slots, shots=shots, dim=dim, batch=batch, seed=seed)
    tell(part, lambda: part.measure(problem, threads=threads, repeats=repeats), as_json=as_json, plot=plot)


@app.command()
def scaling(
    classes: Annotated[str, typer.Option(metavar="1,2,5", help="Numbers of classes.")] = "10,100,1000,10000",
    tenants: Annotated[
        str, typer.Option(metavar="1,2,5", help="Numbers of tenants that take turns.")
    ] = "1,10,100,1000",
    of: Annotated[int, typer.Option(min=1, help="Classes of each of these tenants.")] = 20,
    slots: Annotated[int, typer.Option(min=1, help="Filled dynamic slots of each class.")] = 50,
    shots: Annotated[int, typer.Option(min=0, help="Labelled shots of each class.")] = 0,
    dim: Annotated[int, typer.Option(min=1, help="Entries of a feature.")] = 512,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 leaves it its own choice.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is measured, but for those that take long.")] = 9,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the features.")] = 0,
    as_json: JsonOption = False,  # noqa: FBT002
    plot: PlotOption = None,
) -> None:
    """Answer one image at a time, and measure how that grows with classes and with tenants."""
    from service.bench import scaling as part  # noqa: PLC0415 - as the docstring above says
    from service.bench.readout import Problem  # noqa: PLC0415 - as above

    problem = Problem(classes=of, slots=slots, shots=shots, dim=dim, batch=1, seed=seed)
    numbers = _sizes("classes", classes, MOST_CLASSES), _sizes("tenants", tenants, MOST_TENANTS)
    tell(part, lambda: part.measure(problem, *numbers, threads=threads, repeats=repeats), as_json=as_json, plot=plot)


@app.command()
def store(
    classes: Annotated[int, typer.Option(min=1, max=MOST_CLASSES)] = 1000,
    slots: Annotated[int, typer.Option(min=1, help="Filled slots of each class.")] = 50,
    dim: Annotated[int, typer.Option(min=1, help="Entries of a feature.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 7,
    as_json: JsonOption = False,  # noqa: FBT002
    plot: PlotOption = None,
) -> None:
    """Run an embedded store, and measure what a cold load and an accepted write take."""
    from service.bench import store as part  # noqa: PLC0415 - as the docstring above says

    problem = part.Problem(classes=classes, slots=slots, dim=dim)
    tell(part, lambda: part.measure(problem, repeats=repeats), as_json=as_json, plot=plot)


@app.command()
def plan(
    devices: Annotated[str, typer.Option(metavar="1,2,5", help="Numbers of devices, one a pod.")] = "1,10,1000",
    tenants: Annotated[str, typer.Option(metavar="1,2,5", help="Numbers of tenants.")] = "10,1000,100000",
    classes: Annotated[int, typer.Option(min=1, max=MOST_CLASSES, help="Classes of each.")] = 20,
    slots: Annotated[int, typer.Option(min=0, help="Dynamic slots of each class.")] = 50,
    shots: Annotated[int, typer.Option(min=0, help="Labelled shots of each class.")] = 5,
    dim: Annotated[int, typer.Option(min=1, help="Entries of a feature.")] = 512,
    rate: Annotated[float, typer.Option(min=0.001, help="Images a second that a device encodes.")] = 400.0,
    accepted: Annotated[float, typer.Option(min=0, max=1, help="Share of images that a memory takes in.")] = 0.02,
    auto: Annotated[bool, typer.Option("--auto/--dmn", help="The method of all tenants.")] = True,  # noqa: FBT002
    home: Annotated[bool, typer.Option("--home/--anywhere", help="Whether a tenant goes to one pod.")] = True,  # noqa: FBT002
    shard_gib: Annotated[float, typer.Option(min=0.1, help="Memory of a shard that may be used.")] = 16.0,
    shard_cores: Annotated[float, typer.Option(min=0.01, help="Cores of a shard that may be used.")] = 0.5,
    hot_gib: Annotated[float, typer.Option(min=0.01, help="A pod's budget for hot memories.")] = 1.0,
    link_mbit: Annotated[float, typer.Option(min=1, help="What a pod or a shard may send and receive.")] = 5000.0,
    as_json: JsonOption = False,  # noqa: FBT002
    plot: PlotOption = None,
) -> None:
    """Compute what a fleet needs in pods, shards, memory and network, and what is short first."""
    from service.bench import plan as part  # noqa: PLC0415 - as the docstring above says

    fleets = [
        part.Fleet(
            devices=pods,
            tenants=number,
            classes=classes,
            slots=slots,
            shots=shots,
            dim=dim,
            rate=rate,
            accepted=accepted,
            auto=auto,
            home=home,
            shard_gib=shard_gib,
            shard_cores=shard_cores,
            hot_gib=hot_gib,
            link_mbit=link_mbit,
        )
        for number in _sizes("tenants", tenants, MOST_PLANNED)
        for pods in _sizes("devices", devices, MOST_PLANNED)
    ]
    tell(part, lambda: part.measure(fleets), as_json=as_json, plot=plot)


def _chosen(option: str, text: str, known: Sequence[Name]) -> list[Name]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(known):
        raise InvalidRequest(f"--{option} takes some of {','.join(known)}; got {text!r}.")
    return [name for name in known if name in names]


def _sizes(option: str, text: str, most: int) -> list[int]:
    try:
        sizes = [int(one) for one in text.split(",") if one.strip()]
    except ValueError as error:
        raise InvalidRequest(f"--{option} takes numbers separated by commas, such as 1,8,32; got {text!r}.") from error
    if not sizes or not all(0 < size <= most for size in sizes):
        raise InvalidRequest(f"--{option} must be above 0 and at most {most:,}; got {text!r}.")
    return sizes


def _rates(text: str) -> list[float]:
    try:
        rates = [float(one) for one in text.split(",") if one.strip()]
    except ValueError as error:
        raise InvalidRequest(f"--rates takes numbers separated by commas, such as 1,2,5; got {text!r}.") from error
    if not all(0 < rate <= MOST_A_SECOND for rate in rates):
        raise InvalidRequest(f"--rates must be above 0 and at most {MOST_A_SECOND:,}; got {text!r}.")
    return rates
