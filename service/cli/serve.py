"""`dmn serve`, `dmn encoder`, `dmn config`, and the hidden command of child processes."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.table import Table

from core.errors import CoreError
from service.errors import ServiceError
from service.settings import Settings, operator_key_of
from service.telemetry import logs

from .options import BackendOption, DeviceOption, EncoderOption, JsonOption
from .output import WRONG_INPUT, err, load_settings, out, print_json, quiet_settings, stop


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
    settings = load_settings(
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
        stop("DMN_DEVICES gives each device a process of its own: say DMN_HTTP_WORKERS=1 or more, or use DMN_DEVICE.")
    from service.server.single_process import serve as run  # noqa: PLC0415 - torch takes seconds to import; other commands need not wait

    sys.exit(run(settings, err))


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


def encoder(
    encoder: EncoderOption = None,
    encoder_backend: BackendOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Load an encoder, which fetches its weights where they are not yet, and say what it is."""
    from service.evaluation import commands  # noqa: PLC0415 - as in serve

    settings = quiet_settings(load_settings(encoder=encoder, encoder_backend=encoder_backend, device=device))
    told = commands.loaded_encoder(settings, err)
    if as_json:
        print_json(told)
    else:
        out.print(
            "\n".join(f"{name}: {value}" for name, value in told.items()), highlight=False, markup=False, soft_wrap=True
        )


def config(as_json: JsonOption = False) -> None:  # noqa: FBT002
    """Print the effective settings, secrets masked."""
    settings = load_settings()
    values = {name: _shown(name, getattr(settings, name)) for name in Settings.model_fields}
    if as_json:
        print_json(values)
        return
    table = Table("setting", "value", "meaning", box=None, pad_edge=False)
    for name, field in Settings.model_fields.items():
        table.add_row(f"DMN_{name.upper()}", str(values[name]), field.description or "")
    out.print(table)


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
