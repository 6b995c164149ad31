"""What commands print: JSON, notes, errors; and the settings that they start from."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from service.settings import CONFIG_VARIABLE, Settings
from service.telemetry import logs

out = Console()
err = Console(stderr=True)

WRONG_INPUT = 2
"""Exit status of wrong input, as argument parsers have it."""


def load_settings(**given: object) -> Settings:
    """Return the settings of environment, file and options; end the command if one is wrong."""
    known = {CONFIG_VARIABLE, *(f"DMN_{name.upper()}" for name in Settings.model_fields)}
    for name in sorted(name for name in os.environ if name.startswith("DMN_") and name not in known):
        err.print(f"[yellow]dmn:[/] {escape(name)} is no setting and has no effect.", highlight=False, soft_wrap=True)
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        stop(" ".join(_setting_fault(one) for one in error.errors(include_url=False)))


def _setting_fault(one: Any) -> str:
    name = ".".join(str(part) for part in one["loc"])
    message = str(one["msg"]).removeprefix("Value error, ")
    return message if not name else f"DMN_{name.upper()}: {message}."


def quiet_settings(settings: Settings) -> Settings:
    """Send only warnings to the terminal while a command runs that prints its own answer; it has one encoder."""
    logs.set_up("warning", "text")
    return settings.model_copy(update={"next_encoder": ""})


def check_output_path(file: Path) -> None:
    """Stop if a file cannot be written there: asked before hours are spent on what to write."""
    if not file.parent.is_dir():
        stop(f"{file.parent} is no folder that {file.name} could be written to.")
    if file.is_dir():
        stop(f"{file} is a folder; name a file to write to.")


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def note(message: str) -> None:
    """Say something beside the answer."""
    err.print(f"[bold]dmn:[/] {escape(message)}", highlight=False, soft_wrap=True)


def stop(message: str) -> NoReturn:
    """Print an error and end the command with the status of wrong input."""
    err.print(f"[bold red]dmn:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(WRONG_INPUT)
