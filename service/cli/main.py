"""The command line, `dmn`: serve, classify, evaluate, train, replay, memory, keys, bench, encoder, config.

Settings are made here, once.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core.errors import CoreError
from service import client
from service.errors import ServiceError
from service.settings import CONFIG_VARIABLE, DEFAULT_TENANT, Settings, operator_key_of
from service.telemetry import logs

from .bench import app as bench

app = typer.Typer(
    name="dmn",
    help="An online image classifier that remembers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
memory = typer.Typer(help="Move the memory of a tenant of a running service.", no_args_is_help=True)
app.add_typer(memory, name="memory")
keys = typer.Typer(help="Make, list and revoke API keys, in the store that DMN_STORE names.", no_args_is_help=True)
app.add_typer(keys, name="keys")
app.add_typer(bench, name="bench")
out = Console()
err = Console(stderr=True)

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as shells have it."""

WRONG_INPUT = 2
"""Exit status of wrong input, as argument parsers have it."""

EncoderOption = Annotated[
    str | None, typer.Option("--encoder", help="`lite`, `MODEL/PRETRAINED` of open_clip, or `MODEL@FILE`.")
]
BackendOption = Annotated[
    Literal["torch", "openvino", "onnx"] | None,
    typer.Option("--encoder-backend", help="What runs the image tower; all but torch are for CPUs."),
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Torch device; `auto` takes CUDA if there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


class StreamKind(StrEnum):
    """Kinds of orders, as `core.evaluation.stream_orders` has them; repeated here since that import takes seconds."""

    IID = "iid"
    RUNS = "runs"
    ZIPF = "zipf"
    DRIFT = "drift"


OrdersOption = Annotated[int | None, typer.Option("--orders", min=1, help="Orders to take the mean and the worst of.")]
KindOption = Annotated[
    StreamKind | None,
    typer.Option("--stream", help="Shuffled, in runs of one class, with frequencies like 1/rank, or drifting."),
]
MethodOption = Annotated[
    Literal["dmn", "auto"], typer.Option(help="`dmn` is the paper's; `auto` adds class statistics and calibration.")
]
TenantOption = Annotated[str, typer.Option(help="Whose memory.")]
UrlOption = Annotated[
    str | None, typer.Option("--url", help="Address of the service; by default that of DMN_HOST and DMN_PORT.")
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--key-file", help="File that holds an API key for it; without --url that of DMN_OPERATOR_KEY if left out."
    ),
]


def main() -> None:
    """Run the command line; wrong input ends it with one clear line and status 2."""
    # Threads of torch that wait for the next small operation spin by default. Where cores are shared or limited they
    # starve the one that works: a readout of 14 ms took 200 ms. It has to be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (CoreError, ServiceError, ValueError, OSError) as error:
        _stop(str(error))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one.")] = None,
    encoder: EncoderOption = None,
    encoder_backend: BackendOption = None,
    store: Annotated[str | None, typer.Option(help="Where memories live: `memory`, `embedded`, or a URL.")] = None,
    device: DeviceOption = None,
    devices: Annotated[
        str | None, typer.Option(help="Several devices, `cuda:0,cuda:1`; each gets a worker process.")
    ] = None,
    http_workers: Annotated[
        int | None, typer.Option(min=0, help="HTTP processes before the worker processes; 0: one process does all.")
    ] = None,
) -> None:
    """Serve over HTTP."""
    settings = _settings(
        host=host,
        port=port,
        encoder=encoder,
        encoder_backend=encoder_backend,
        store=store,
        device=device,
        devices=devices,
        http_workers=http_workers,
    )
    if settings.auth == "keys":
        operator_key_of(settings)  # before anything that takes its time
    logs.set_up(settings.log_level, settings.log_format)
    # In a container this is process 1, which signals that nobody handles do not end; loading takes its time.
    signal.signal(signal.SIGTERM, _leave)
    if settings.http_workers:
        from service.multiprocess.supervisor import keep  # noqa: PLC0415 - it does without torch, whose import takes seconds

        sys.exit(keep(settings, err))
    if settings.devices:
        _stop("DMN_DEVICES gives each device a process of its own: say DMN_HTTP_WORKERS=1 or more, or use DMN_DEVICE.")
    from service.server.single_process import serve as run  # noqa: PLC0415 - torch takes seconds to import; other commands need not wait

    sys.exit(run(settings, err))


@app.command(hidden=True)
def room(lifeline: int) -> None:
    """Be one process of a service that runs in several; `dmn serve` starts it."""
    from service.multiprocess.control import Lifeline  # noqa: PLC0415 - as in serve
    from service.server import event_loop  # noqa: PLC0415 - as in serve

    line = Lifeline(lifeline)
    plan = line.plan()
    logs.set_up(plan.settings.log_level, plan.settings.log_format, process=plan.name)
    try:
        if plan.role == "front":
            from service.multiprocess.frontend import attend as run  # noqa: PLC0415 - as in serve
        else:
            from service.multiprocess.worker import work as run  # noqa: PLC0415 - as in serve
        sys.exit(event_loop.run(run(plan, line)))
    except (CoreError, ServiceError, ValueError, OSError) as error:
        if line.told:
            raise
        line.failed(str(error))
        sys.exit(WRONG_INPUT)
    finally:
        if line.alone:  # who would have cleaned up was killed
            shutil.rmtree(Path(plan.hatches[0]).parent, ignore_errors=True)


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    classes: Annotated[str, typer.Option(help="Class names, separated by commas.")],
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 3,
    encoder: EncoderOption = None,
    encoder_backend: BackendOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Classify image files among classes, with a memory that lasts for this call."""
    from service.evaluation import commands  # noqa: PLC0415 - as in serve

    names = [name.strip() for name in classes.split(",") if name.strip()]
    settings = _quiet(_settings(encoder=encoder, encoder_backend=encoder_backend, device=device, store="memory"))
    answers = asyncio.run(commands.classify_files(settings, images, names, err))
    if as_json:
        _print_json([{"image": str(path), **answer.json(top_k)} for path, answer in answers])
    else:
        out.print(commands.answers_table(answers, top_k))
    if any(answer.error for _, answer in answers):
        sys.exit(1)


@app.command()
def evaluate(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Folders that hold one folder of images for each class."),
    ] = None,
    paper: Annotated[
        Path | None, typer.Option(metavar="ROOT", help="Instead: the data sets of the paper, in their usual folders.")
    ] = None,
    datasets: Annotated[
        str, typer.Option(metavar="A,B", help="With --paper: some of them, by folder; all that are found if left out.")
    ] = "",
    shots: Annotated[int, typer.Option(min=0, help="Labelled shots a class, taken out of the stream.")] = 0,
    train: Annotated[  # noqa: FBT002
        bool, typer.Option("--train", help="Train on the shots before the stream, as the service does.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order, and of the choice of shots.")] = 0,
    orders: OrdersOption = None,
    kind: KindOption = None,
    unknown: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures of none of the classes, to be mixed in.")
    ] = None,
    views: Annotated[int, typer.Option(min=1, help="Views an image.")] = 1,
    method: Annotated[
        Literal["dmn", "auto"] | None, typer.Option(help="The tenant's method; `auto`, or with --paper `dmn`.")
    ] = None,
    report_file: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.md", help="Write a report, with curves as PNG files beside it."),
    ] = None,
    encoder: EncoderOption = None,
    encoder_backend: BackendOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Stream folders through the service's own code and measure each branch.

    Several folders are domains of the same classes: mixed, or one after another with `--stream drift`.
    """
    from service.evaluation import commands, report, run  # noqa: PLC0415 - as in serve
    from service.evaluation.datasets import pictures_under  # noqa: PLC0415

    if bool(directories) == (paper is not None):
        _stop("Name either folders of class folders, or --paper and the folder that holds the data sets.")
    if datasets and paper is None:
        _stop("--datasets chooses among those of --paper ROOT.")
    if train and not shots:
        _stop("--train trains on shots; say with --shots how many a class.")
    plan = run.Plan(
        shots=shots,
        seeds=range(seed, seed + (orders or 1)),
        kind=_kind(orders, kind),
        views=views,
        train=train,
        method=method or ("auto" if paper is None else "dmn"),
        unknown=() if unknown is None else pictures_under(unknown),
    )
    if report_file is not None:
        report.check_place(report_file)
    settings = _quiet(_settings(encoder=encoder, encoder_backend=encoder_backend, device=device, store="memory"))
    if paper is None:
        told, courses = asyncio.run(commands.evaluate_folders(settings, directories or [], plan, err))
        sheet = report.report_sheet(told)
    else:
        names = [name for name in datasets.split(",") if name.strip()]
        told, courses = asyncio.run(commands.evaluate_paper(settings, paper, names, plan, err))
        sheet = report.paper_sheet(told)
        if told["missing"] and as_json:
            err.print(report.absence(told["missing"]), highlight=False, markup=False, soft_wrap=True)
    if report_file is not None:
        report.write(report_file, shlex.join(["dmn", *sys.argv[1:]]), settings.encoder, plan, sheet, courses)
    if as_json:
        _print_json(told)
    else:
        out.print(sheet.table())


@app.command()
def train(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of one folder of images for each class.")],
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Passes over the shots at most.")] = 20,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the first step; by default 1e-4 times 100 over the encoder's logit scale.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**53 - 1, help="Seed of order, crops, and of what is held out.")] = 0,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Pictures of each class to train on; all if left out.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the trained memory, for `dmn memory import`.")
    ] = None,
    encoder: EncoderOption = None,
    encoder_backend: BackendOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Train the offsets of a label set on labelled pictures, and measure them on some that are held out."""
    from service.evaluation import train_folder  # noqa: PLC0415 - as in serve
    from service.tenants import training  # noqa: PLC0415 - as in serve

    if learning_rate is not None and not 0 < learning_rate <= 1:
        _stop(f"--learning-rate must be above 0 and at most 1; got {learning_rate}.")
    if output is not None:
        _check_place(output)
    settings = _quiet(_settings(encoder=encoder, encoder_backend=encoder_backend, device=device, store="memory"))
    options = training.Options(epochs=epochs, learning_rate=learning_rate, seed=seed)
    told = asyncio.run(train_folder.train_folder(settings, directory, options, shots=shots, output=output, console=err))
    if as_json:
        _print_json(told)
    else:
        out.print(train_folder.result_table(told))


@app.command()
def replay(
    stream: Annotated[Path, typer.Argument(help="A stream of features, `.npz`.")],
    slots: Annotated[int | None, typer.Option(min=0, help="Dynamic slots a class.")] = None,
    beta: Annotated[float | None, typer.Option(min=0, help="Sharpness of the affinity.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights of text, dynamic and static branch, with `dmn`; 1,1,1 if left out."),
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="The first K shots of each class; all if left out.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Shuffle the stream; the file's order if left out.")] = None,
    orders: OrdersOption = None,
    kind: KindOption = None,
    no_learn: Annotated[bool, typer.Option("--no-learn", help="Read, but do not write.")] = False,  # noqa: FBT002
    method: MethodOption = "dmn",
    as_json: JsonOption = False,  # noqa: FBT002
    output: Annotated[Path | None, typer.Option("--out", help="Write every answer to this `.npz`.")] = None,
) -> None:
    """Run a stream of features through the method, in order, without a server."""
    from service.evaluation import commands, report  # noqa: PLC0415 - as in serve

    if beta is not None and not math.isfinite(beta):
        _stop(f"--beta must be a finite number, at least 0; got {beta}.")
    if weights is not None and method == "auto":
        _stop("--weights weigh the branches of the method dmn; auto finds its own, so leave them out.")
    if output is not None:
        _check_place(output)
    branch_weights = _weights("1,1,1" if weights is None else weights)
    options = {"slots": slots, "beta": beta, "shots": shots, "learn": not no_learn, "method": method}
    which = _kind(orders, kind)
    if which is None:
        told = commands.replay_file(stream, {**options, "seed": seed}, branch_weights, output, err)
    elif output is not None:
        _stop("--out holds the answers to one stream in the file's order; leave out --orders and --stream.")
    else:
        seeds = range(seed or 0, (seed or 0) + (orders or 1))
        told = commands.replay_orders(stream, options, branch_weights, kind=which, seeds=seeds, console=err)
    if as_json:
        _print_json(told)
    else:
        out.print(report.report_sheet(told).table())


@memory.command("export")
def export_memory(
    file: Annotated[Path, typer.Argument(help="Where to write the memory, a safetensors file.")],
    tenant: TenantOption = DEFAULT_TENANT,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,  # noqa: FBT002
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Write a tenant's configuration and memories to a file."""
    size = client.export_memory(*_service(url, key_file), tenant, file, err, force=force)
    if as_json:
        _print_json({"tenant": tenant, "file": str(file), "bytes": size})
    else:
        out.print(f"The memory of {tenant} is in {file} ({size:,} bytes).", highlight=False, soft_wrap=True)


@memory.command("import")
def import_memory(
    file: Annotated[Path, typer.Argument(help="An exported memory.")],
    tenant: TenantOption = DEFAULT_TENANT,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Replace a tenant's configuration and memories by an exported file, or create the tenant."""
    told = client.import_memory(*_service(url, key_file), tenant, file, err)
    if as_json:
        _print_json(told)
        return
    saved = told["snapshot"]
    kept = f" What it was before is in the snapshot {saved['id']}." if saved else ""
    out.print(f"The memory of {tenant} is now that of {file}.{kept}", highlight=False, soft_wrap=True)


@memory.command("migrate")
def migrate_memory(
    tenant: TenantOption = DEFAULT_TENANT,
    switch: Annotated[bool, typer.Option("--switch", help="Put the next encoder's memory in its place.")] = False,  # noqa: FBT002
    status: Annotated[bool, typer.Option("--status", help="Say how far it is; so does no option.")] = False,  # noqa: FBT002
    abandon: Annotated[bool, typer.Option("--abandon", help="Drop what the next encoder has learned.")] = False,  # noqa: FBT002
    force: Annotated[bool, typer.Option("--force", help="With --switch: also if shots are lost by it.")] = False,  # noqa: FBT002
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Move a tenant to the encoder that DMN_NEXT_ENCODER of a running service names."""
    if switch + status + abandon > 1 or (force and not switch):
        _stop("Say one of --switch, --status and --abandon; --force goes with --switch.")
    where = _service(url, key_file)
    if abandon:
        client.abandon(*where, tenant)
        told: dict[str, Any] = {"tenant": tenant}
        line = f"What the next encoder had learned of {tenant} is gone."
    elif switch:
        told = {"tenant": tenant, **client.switch(*where, tenant, err, force=force)}
        line = _switched(told)
    else:
        told = client.migration(*where, tenant)
        line = _standing(told)
    if as_json:
        _print_json(told)
    else:
        out.print(line, highlight=False, soft_wrap=True)


@keys.command("create")
def create_key(
    scope: Annotated[
        str, typer.Option(help="What it allows, separated by commas: classify, memory, admin, metrics; or operator.")
    ],
    tenant: Annotated[
        str, typer.Option(help="Whose key it is; left out for operator, and for metrics if you like.")
    ] = "",
    expires: Annotated[
        str | None, typer.Option(help="When it expires: 90d, 12h, or a date (UTC); never if left out.")
    ] = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Make a key and print it: this once, for only its hash is kept."""
    from . import key_admin  # noqa: PLC0415 - as in serve

    now = time.time()
    scopes = list(dict.fromkeys(name for part in scope.split(",") if (name := part.strip())))
    ends = None if expires is None else key_admin.moment(expires, now)
    settings = _quiet(_settings())
    key, kept, there = asyncio.run(key_admin.create(settings, tenant=tenant, scopes=scopes, expires=ends, now=now))
    if as_json:
        _print_json({"key": key, **key_admin.told(kept, now)})
    else:
        sys.stdout.write(f"{key}\n")
        _note(f"This is the only time that this key is shown. Its id is {kept.id}.")
    if not there:
        _note(f"There is no tenant {tenant!r} yet. A key with the scope admin, or operator, can create it.")
    if settings.auth == "open":
        _note("A service asks for keys only if it is started with DMN_AUTH=keys.")


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Whose keys; all if left out.")] = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """List keys, without what would open anything."""
    from . import key_admin  # noqa: PLC0415 - as in serve

    now, found = time.time(), asyncio.run(key_admin.every(_quiet(_settings()), tenant))
    if as_json:
        _print_json({"keys": [key_admin.told(key, now) for key in found]})
    else:
        out.print(key_admin.table(found, now))


@keys.command("revoke")
def revoke_key(
    which: Annotated[str, typer.Argument(metavar="ID", help="Its id, as `dmn keys list` shows it; or the key itself.")],
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Take a key back; every service on the store refuses it within a second."""
    from . import key_admin  # noqa: PLC0415 - as in serve

    id_ = asyncio.run(key_admin.revoke(_quiet(_settings()), which))
    if as_json:
        _print_json({"id": id_, "revoked": True})
    else:
        out.print(f"The key {id_} is revoked.", highlight=False, soft_wrap=True)


@app.command()
def encoder(
    encoder: EncoderOption = None,
    encoder_backend: BackendOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Load an encoder, which fetches its weights where they are not yet, and say what it is."""
    from service.evaluation import commands  # noqa: PLC0415 - as in serve

    settings = _quiet(_settings(encoder=encoder, encoder_backend=encoder_backend, device=device))
    told = commands.loaded_encoder(settings, err)
    if as_json:
        _print_json(told)
    else:
        out.print(
            "\n".join(f"{name}: {value}" for name, value in told.items()), highlight=False, markup=False, soft_wrap=True
        )


@app.command()
def config(as_json: JsonOption = False) -> None:  # noqa: FBT002
    """Print the effective settings, secrets masked."""
    settings = _settings()
    values = {name: _shown(name, getattr(settings, name)) for name in Settings.model_fields}
    if as_json:
        _print_json(values)
        return
    table = Table("setting", "value", "meaning", box=None, pad_edge=False)
    for name, field in Settings.model_fields.items():
        table.add_row(f"DMN_{name.upper()}", str(values[name]), field.description or "")
    out.print(table)


def _settings(**given: object) -> Settings:
    known = {CONFIG_VARIABLE, *(f"DMN_{name.upper()}" for name in Settings.model_fields)}
    for name in sorted(name for name in os.environ if name.startswith("DMN_") and name not in known):
        err.print(f"[yellow]dmn:[/] {escape(name)} is no setting and has no effect.", highlight=False, soft_wrap=True)
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        _stop(" ".join(_setting_fault(one) for one in error.errors(include_url=False)))


def _service(url: str | None, key_file: Path | None) -> tuple[str, str]:
    """Return where a service is, and the key for it or ''. The operator's own goes to the one of the settings alone."""
    given = "" if key_file is None else _key_in(key_file)
    if url is not None:
        return url.rstrip("/"), given
    settings = _settings()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}", given or operator_key_of(settings)


def _key_in(file: Path) -> str:
    key = file.read_text(encoding="utf-8", errors="replace").strip()
    if not key.isascii() or not key.isprintable() or not key or " " in key:
        _stop(f"{file} does not hold an API key and nothing else.")
    return key


def _setting_fault(one: Any) -> str:
    name = ".".join(str(part) for part in one["loc"])
    message = str(one["msg"]).removeprefix("Value error, ")
    return message if not name else f"DMN_{name.upper()}: {message}."


def _quiet(settings: Settings) -> Settings:
    """Send only warnings to the terminal while a command runs that prints its own answer; it has one encoder."""
    logs.set_up("warning", "text")
    return settings.model_copy(update={"next_encoder": ""})


def _kind(orders: int | None, kind: StreamKind | None) -> Literal["iid", "runs", "zipf", "drift"] | None:
    """Return the kind of the orders; None if neither was asked for, and one stream is measured by itself."""
    if orders is None and kind is None:
        return None
    return (kind or StreamKind.IID).value


def _weights(text: str) -> tuple[float, float, float]:
    try:
        a1, a2, a3 = (float(part) for part in text.split(","))
    except ValueError:
        _stop(f"--weights takes three numbers separated by commas, such as 1,1,1; got {text!r}.")
    if min(a1, a2, a3) < 0 or not 0 < a1 + a2 + a3 < float("inf"):
        _stop("--weights must be finite, not negative, and not all zero.")
    return a1, a2, a3


def _check_place(file: Path) -> None:
    """Stop if a file cannot be written there: asked before hours are spent on what to write."""
    if not file.parent.is_dir():
        _stop(f"{file.parent} is no folder that {file.name} could be written to.")
    if file.is_dir():
        _stop(f"{file} is a folder; name a file to write to.")


def _standing(told: dict[str, Any]) -> str:
    """Return where a tenant is on its way to another encoder, in words."""
    held = "{slots} slots and {shots} shots".format
    line = f"The memory of {told['tenant']} is of {told['encoder']}: {held(**told['memory'])}."
    if told["next"] is None:
        return f"{line} There is no next encoder that it could be switched to."
    line += f" Under {told['next']} " + ("nothing is learned yet." if told["shadow"] is None else "there are ")
    line += "" if told["shadow"] is None else f"{held(**told['shadow'])}."
    if told["stranded"]:
        line += f" {told['stranded']} shots have no kept image, and would be lost."
    return line + (" What was trained has to be trained anew." if told["trained"] else "")


def _switched(told: dict[str, Any]) -> str:
    """Return what a switch did, in words."""
    back = f" What it was before is in the snapshot {told['snapshot']}." if told["snapshot"] else ""
    return f"{told['tenant']} is now of {told['encoder']}: {told['slots']} slots and {told['shots']} shots.{back}"


def _shown(name: str, value: object) -> object:
    """Return a setting as it may be shown: a store's URL without its password, and no key."""
    if name == "operator_key" and value:
        return "********"
    if name == "store" and "://" in str(value):
        scheme, _, rest = str(value).partition("://")
        place, _, query = rest.partition("?")
        login, at, host = place.rpartition("@")
        return f"{scheme}://{'********' if login else ''}{at}{host}{'?********' if query else ''}"
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return {key: one.model_dump(exclude_none=True) for key, one in value.items()}
    return str(value) if isinstance(value, Path) else value


def _leave(number: int, _frame: object) -> NoReturn:
    """End in order, as a signal asks for before the door is open; from then on the door listens to it."""
    signal.signal(number, signal.SIG_IGN)  # once is enough: nothing may break off what ends
    sys.exit(128 + number)


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _note(message: str) -> None:
    """Say something beside the answer."""
    err.print(f"[bold]dmn:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _stop(message: str) -> NoReturn:
    err.print(f"[bold red]dmn:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(WRONG_INPUT)
