"""`dmn keys`: create, list and revoke API keys."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Annotated

import typer

from .options import JsonOption
from .output import load_settings, note, out, print_json, quiet_settings

keys = typer.Typer(help="Make, list and revoke API keys, in the store that DMN_STORE names.", no_args_is_help=True)


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
    settings = quiet_settings(load_settings())
    key, kept, there = asyncio.run(key_admin.create(settings, tenant=tenant, scopes=scopes, expires=ends, now=now))
    if as_json:
        print_json({"key": key, **key_admin.told(kept, now)})
    else:
        sys.stdout.write(f"{key}\n")
        note(f"This is the only time that this key is shown. Its id is {kept.id}.")
    if not there:
        note(f"There is no tenant {tenant!r} yet. A key with the scope admin, or operator, can create it.")
    if settings.auth == "open":
        note("A service asks for keys only if it is started with DMN_AUTH=keys.")


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Whose keys; all if left out.")] = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """List keys, without what would open anything."""
    from . import key_admin  # noqa: PLC0415 - as in serve

    now, found = time.time(), asyncio.run(key_admin.every(quiet_settings(load_settings()), tenant))
    if as_json:
        print_json({"keys": [key_admin.told(key, now) for key in found]})
    else:
        out.print(key_admin.table(found, now))


@keys.command("revoke")
def revoke_key(
    which: Annotated[str, typer.Argument(metavar="ID", help="Its id, as `dmn keys list` shows it; or the key itself.")],
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Take a key back; every service on the store refuses it within a second."""
    from . import key_admin  # noqa: PLC0415 - as in serve

    id_ = asyncio.run(key_admin.revoke(quiet_settings(load_settings()), which))
    if as_json:
        print_json({"id": id_, "revoked": True})
    else:
        out.print(f"The key {id_} is revoked.", highlight=False, soft_wrap=True)
