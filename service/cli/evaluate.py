"""`dmn classify`, `dmn evaluate`, `dmn train` and `dmn replay`."""

from __future__ import annotations

import asyncio
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import (
    BackendOption,
    DeviceOption,
    EncoderOption,
    JsonOption,
    KindOption,
    MethodOption,
    OrdersOption,
    StreamKind,
)
from .output import check_output_path, err, load_settings, out, print_json, quiet_settings, stop


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
    settings = quiet_settings(
        load_settings(encoder=encoder, encoder_backend=encoder_backend, device=device, store="memory")
    )
    answers = asyncio.run(commands.classify_files(settings, images, names, err))
    if as_json:
        print_json([{"image": str(path), **answer.json(top_k)} for path, answer in answers])
    else:
        out.print(commands.answers_table(answers, top_k))
    if any(answer.error for _, answer in answers):
        sys.exit(1)


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
        stop("Name either folders of class folders, or --paper and the folder that holds the data sets.")
    if datasets and paper is None:
        stop("--datasets chooses among those of --paper ROOT.")
    if train and not shots:
        stop("--train trains on shots; say with --shots how many a class.")
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
    settings = quiet_settings(
        load_settings(encoder=encoder, encoder_backend=encoder_backend, device=device, store="memory")
    )
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
        print_json(told)
    else:
        out.print(sheet.table())


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
        stop(f"--learning-rate must be above 0 and at most 1; got {learning_rate}.")
    if output is not None:
        check_output_path(output)
    settings = quiet_settings(
        load_settings(encoder=encoder, encoder_backend=encoder_backend, device=device, store="memory")
    )
    options = training.Options(epochs=epochs, learning_rate=learning_rate, seed=seed)
    told = asyncio.run(train_folder.train_folder(settings, directory, options, shots=shots, output=output, console=err))
    if as_json:
        print_json(told)
    else:
        out.print(train_folder.result_table(told))


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
        stop(f"--beta must be a finite number, at least 0; got {beta}.")
    if weights is not None and method == "auto":
        stop("--weights weigh the branches of the method dmn; auto finds its own, so leave them out.")
    if output is not None:
        check_output_path(output)
    branch_weights = _weights("1,1,1" if weights is None else weights)
    options = {"slots": slots, "beta": beta, "shots": shots, "learn": not no_learn, "method": method}
    which = _kind(orders, kind)
    if which is None:
        told = commands.replay_file(stream, {**options, "seed": seed}, branch_weights, output, err)
    elif output is not None:
        stop("--out holds the answers to one stream in the file's order; leave out --orders and --stream.")
    else:
        seeds = range(seed or 0, (seed or 0) + (orders or 1))
        told = commands.replay_orders(stream, options, branch_weights, kind=which, seeds=seeds, console=err)
    if as_json:
        print_json(told)
    else:
        out.print(report.report_sheet(told).table())


def _kind(orders: int | None, kind: StreamKind | None) -> Literal["iid", "runs", "zipf", "drift"] | None:
    """Return the kind of the orders; None if neither was asked for, and one stream is measured by itself."""
    if orders is None and kind is None:
        return None
    return (kind or StreamKind.IID).value


def _weights(text: str) -> tuple[float, float, float]:
    try:
        a1, a2, a3 = (float(part) for part in text.split(","))
    except ValueError:
        stop(f"--weights takes three numbers separated by commas, such as 1,1,1; got {text!r}.")
    if min(a1, a2, a3) < 0 or not 0 < a1 + a2 + a3 < float("inf"):
        stop("--weights must be finite, not negative, and not all zero.")
    return a1, a2, a3
