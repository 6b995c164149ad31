"""The command line, `dmn`: serve, classify, evaluate, train, replay, memory, keys, bench, encoder, config.

Settings are made here, once.
"""

from __future__ import annotations

import os
import sys

import typer

from core.errors import CoreError
from service.errors import ServiceError

from .bench import app as bench
from .evaluate import classify, evaluate, replay, train
from .keys import keys
from .memory import memory
from .output import stop
from .serve import config, encoder, room, serve

app = typer.Typer(
    name="dmn",
    help="An online image classifier that remembers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, classify, evaluate, train, replay, encoder, config):
    app.command()(command)
app.command(hidden=True)(room)
app.add_typer(memory, name="memory")
app.add_typer(keys, name="keys")
app.add_typer(bench, name="bench")

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as shells have it."""


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
        stop(str(error))
