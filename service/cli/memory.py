"""`dmn memory`: export, import and migrate memories of a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from service import client
from service.settings import DEFAULT_TENANT, operator_key_of

from .options import JsonOption, KeyFileOption, TenantOption, UrlOption
from .output import err, load_settings, out, print_json, stop

memory = typer.Typer(help="Move the memory of a tenant of a running service.", no_args_is_help=True)


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
        print_json({"tenant": tenant, "file": str(file), "bytes": size})
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
        print_json(told)
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
        stop("Say one of --switch, --status and --abandon; --force goes with --switch.")
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
        print_json(told)
    else:
        out.print(line, highlight=False, soft_wrap=True)


def _service(url: str | None, key_file: Path | None) -> tuple[str, str]:
    """Return where a service is, and the key for it or ''. The operator's own goes to the one of the settings alone."""
    given = "" if key_file is None else _key_in(key_file)
    if url is not None:
        return url.rstrip("/"), given
    settings = load_settings()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}", given or operator_key_of(settings)


def _key_in(file: Path) -> str:
    key = file.read_text(encoding="utf-8", errors="replace").strip()
    if not key.isascii() or not key.isprintable() or not key or " " in key:
        stop(f"{file} does not hold an API key and nothing else.")
    return key


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
