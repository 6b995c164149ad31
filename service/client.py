"""Commands that talk to a running service: export, import and migration of a tenant's memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

PART_BYTES = 1 << 20

_MIGRATION = "/admin/memory/migration"
_LOOK_S = 0.2

_TIMEOUT = httpx.Timeout(30.0, read=600.0, write=600.0)
"""Seconds; a large memory takes its time to be written aside before the service answers."""


def export_memory(url: str, key: str, tenant: str, path: Path, console: Console, *, force: bool) -> int:
    """Write a tenant's memory to a file, which is there whole or not at all, and return its bytes.

    Raises:
        FileNotFoundError: there is no such folder.
        FileExistsError: the file is there, and is not to be replaced.
        ConnectionError: the service does not answer.
        ValueError: it refuses; says why.
    """
    if path.exists() and not force:
        raise FileExistsError(f"{path} is there already. Name another file, or say --force to replace it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} to.")
    partial = path.with_name(f"{path.name}.part")
    with connected(url, tenant, key) as client, client.stream("GET", "/admin/memory/export") as answer:
        if answer.is_error:
            answer.read()
        check(answer)
        size = int(answer.headers["content-length"])
        try:
            with partial.open("wb") as file, _progress(console) as bar:
                task = bar.add_task(f"Exporting {tenant}", total=size)
                for part in answer.iter_bytes(PART_BYTES):
                    file.write(part)
                    bar.advance(task, len(part))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return size


def import_memory(url: str, key: str, tenant: str, path: Path, console: Console) -> dict[str, Any]:
    """Replace a tenant's memory by a file's, or create the tenant, and return what the service says.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the service does not answer.
        ValueError: it refuses; says why, and nothing was changed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    size = path.stat().st_size
    with connected(url, tenant, key) as client, path.open("rb") as file, _progress(console) as bar:
        task = bar.add_task(f"Importing into {tenant}", total=size)

        def parts() -> Iterator[bytes]:
            while part := file.read(PART_BYTES):
                yield part
                bar.advance(task, len(part))

        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        answer = client.post("/admin/memory/import", content=parts(), headers=headers)
    check(answer)
    told: dict[str, Any] = answer.json()
    return told


def migration(url: str, key: str, tenant: str) -> dict[str, Any]:
    """Return where a tenant is on its way to the next encoder.

    Raises:
        ConnectionError: the service does not answer.
        ValueError: it refuses; says why.
    """
    with connected(url, tenant, key) as client:
        answer = client.get(_MIGRATION)
    check(answer)
    told: dict[str, Any] = answer.json()
    return told


def switch(url: str, key: str, tenant: str, console: Console, *, force: bool) -> dict[str, Any]:
    """Switch a tenant to the next encoder, wait until it is, and return what the job says of it.

    Raises:
        ConnectionError: the service does not answer.
        ValueError: it refuses, or the job fails; says why.
    """
    with connected(url, tenant, key) as client, console.status(f"Switching {tenant} …"):
        answer = client.post(_MIGRATION, json={"force": force})
        check(answer)
        while (job := answer.json())["state"] in ("queued", "running"):
            time.sleep(_LOOK_S)
            answer = client.get(f"/jobs/{job['id']}")
            check(answer)
    if job["state"] != "done":
        why = f"{job['error']['title']}: {job['error']['detail']}" if job["error"] else "It was cancelled."
        raise ValueError(f"{tenant} was not switched. {why}")
    result: dict[str, Any] = job["result"]
    return result


def abandon(url: str, key: str, tenant: str) -> None:
    """Drop what the next encoder has learned of a tenant.

    Raises:
        ConnectionError: the service does not answer.
        ValueError: it refuses; says why.
    """
    with connected(url, tenant, key) as client:
        check(client.delete(_MIGRATION))


@contextmanager
def connected(url: str, tenant: str, key: str = "") -> Iterator[httpx.Client]:
    """Let a client ask a service for a tenant, with an API key or, if that is '', without.

    Raises:
        ConnectionError: the service does not answer.
        ValueError: that is no address.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"--url takes a service's address, such as http://127.0.0.1:8000; got {url!r}.")
    try:
        headers = {"X-Tenant": tenant} | ({"Authorization": f"Bearer {key}"} if key else {})
        with httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT) as client:
            yield client
    except httpx.ConnectError as error:
        raise ConnectionError(
            f"No service answers at {url}. Start one with `dmn serve`, or name it by --url."
        ) from error
    except httpx.HTTPError as error:
        raise ConnectionError(f"The service at {url} broke off: {type(error).__name__}.") from error


def check(answer: httpx.Response) -> None:
    """Return if a service did what it was asked.

    Raises:
        ValueError: it did not; says why.
    """
    if answer.is_success:
        return
    if answer.headers.get("content-type") != "application/problem+json":
        raise ValueError(f"What answers at {answer.url} is no dmn-clip-service: its status is {answer.status_code}.")
    problem = answer.json()
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise ValueError(f"{problem['title']}: {problem['detail']} Name a file that holds one by --key-file.")
    raise ValueError(f"{problem['title']}: {problem['detail']}")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
