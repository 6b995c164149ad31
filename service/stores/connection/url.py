"""A store's URL taken apart: where it is, and how it is entered."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

Kind = Literal["single", "unix", "sentinel", "cluster"]
Address = tuple[str, int]

_SCHEMES: Mapping[str, tuple[Kind, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_EXAMPLES: Mapping[Kind, str] = {
    "single": "redis://user:password@host:6379/0",
    "unix": "unix:///run/valkey.sock?db=0",
    "sentinel": "redis+sentinel://user:password@host1:26379,host2:26379/service/0",
    "cluster": "redis+cluster://user:password@host1:6379,host2:6379",
}
_PORTS: Mapping[Kind, int] = {"single": 6379, "unix": 0, "sentinel": 26379, "cluster": 6379}

_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
TLS_OPTIONS = (*_TLS_FILES, "ssl_cert_reqs", "ssl_check_hostname")
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a store is, and how it is entered; `name` is the socket's path or the Sentinels' name for the primary."""

    kind: Kind
    tls: bool
    hosts: tuple[Address, ...]
    name: str
    db: int
    username: str | None
    password: str | None = field(repr=False)
    options: Mapping[str, str] = field(repr=False)

    @property
    def shown(self) -> str:
        """Where it is, for people; without the password."""
        if self.kind == "unix":
            return f"at {self.name}"
        hosts = ", ".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{self.name!r} of the Sentinels at {hosts}" if self.kind == "sentinel" else f"at {hosts}"

    def login(self) -> dict[str, Any]:
        return {"username": self.username, "password": self.password}

    def security(self) -> dict[str, Any]:
        """Return what redis-py wants to know for TLS."""
        given: dict[str, Any] = {name: value for name, value in self.options.items() if name in TLS_OPTIONS}
        if "ssl_check_hostname" in given:
            given["ssl_check_hostname"] = given["ssl_check_hostname"] == "true"
        return given


def parse(url: str) -> Place:
    """Return what a URL says. By hand: the standard library knows neither several hosts nor raw `[` in a password.

    Raises:
        ValueError: as for `connect`. What the user wrote is not repeated: a password may stand anywhere by mistake.
    """
    scheme, colon, rest = url.partition("://")
    if not colon or scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ValueError(f"The store URL must begin with one of {known} (such as {_EXAMPLES['single']}).")
    kind, tls = _SCHEMES[scheme]
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    _refuse_raw_letters(kind, rest, authority, path, query)
    user, _, hosts = authority.rpartition("@")
    username, _, password = user.partition(":")
    options = _options(kind, query, tls=tls)
    name, db = _inside(kind, path, options.get("db"))
    return Place(
        kind=kind,
        tls=tls,
        hosts=_hosts(kind, hosts),
        name=name,
        db=db,
        username=unquote(username) or None,
        password=unquote(password) or None,
        options=options,
    )


def _refuse_raw_letters(kind: Kind, rest: str, authority: str, path: str, query: str) -> None:
    """Raise for a password that was not encoded and so ends before it should."""
    if any(letter.isspace() or not letter.isprintable() for letter in rest):
        raise _wrong(kind, "holds a space or a control character")
    if "#" in rest or "@" in path or ("@" in query and "@" not in authority):
        raise _wrong(kind, "holds one of / ? # @ where it cannot be; in user and password write %2F %3F %23 %40")


def _hosts(kind: Kind, text: str) -> tuple[Address, ...]:
    if kind == "unix":
        if text:
            raise _wrong(kind, "names a host, or a path that does not begin with /")
        return ()
    hosts = tuple(_host(kind, part) for part in text.split(","))
    if kind == "single" and len(hosts) > 1:
        raise _wrong(kind, "has several hosts, which only +sentinel:// and +cluster:// take")
    return hosts


def _host(kind: Kind, text: str) -> Address:
    found = re.fullmatch(r"(?:\[(?P<v6>[^\[\]]*)\]|(?P<name>[^:\[\]]*))(?::(?P<port>[^:]*))?", text)
    if found is None:
        raise _wrong(kind, "has a host that cannot be read; an IPv6 address stands in brackets, as in [::1]:6379")
    if found["name"] == "":
        raise _wrong(kind, "has no host")
    port = str(_PORTS[kind]) if found["port"] is None else found["port"]
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise _wrong(kind, "has a port that is no number from 1 to 65535")
    if found["v6"] is not None:
        return _v6(kind, found["v6"]), int(port)
    return found["name"], int(port)


def _v6(kind: Kind, text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(unquote(text)))
    except ValueError:
        raise _wrong(kind, "has something else than an IPv6 address in brackets") from None


def _options(kind: Kind, query: str, *, tls: bool) -> dict[str, str]:
    pairs = (part.partition("=") for part in query.split("&") if part)
    given = {unquote(name): unquote(value) for name, _, value in pairs}
    known = (
        *(("db",) if kind in ("single", "unix") else ()),
        *(TLS_OPTIONS if tls else ()),
        *(_SENTINEL_OPTIONS if kind == "sentinel" else ()),
    )
    if unknown := sorted(name for name in given if name not in known):
        listed = f"it knows {', '.join(known)}" if known else "it knows none"
        named = next((name for name in unknown if re.fullmatch(r"[a-z_]{1,30}", name)), None)
        raise _wrong(kind, f"has an option that is not known{f' ({named})' if named else ''}; {listed}")
    for name in _TLS_FILES:
        if name in given and not Path(given[name]).is_file():
            raise _wrong(kind, f"gives a file by {name} that is not there")
    if given.get("ssl_check_hostname", "true") not in ("true", "false"):
        raise _wrong(kind, "has an ssl_check_hostname that is neither true nor false")
    if given.get("ssl_cert_reqs", "required") not in ("none", "optional", "required"):
        raise _wrong(kind, "has an ssl_cert_reqs that is none of none, optional and required")
    return given


def _inside(kind: Kind, path: str, option: str | None) -> tuple[str, int]:
    """Return the name and the database that the path gives, or an option of the URL."""
    if kind == "unix":
        if not path:
            raise _wrong(kind, "has no path of a socket")
        return f"/{unquote(path)}", _db(kind, option or "0")
    if kind == "sentinel":
        name, _, number = path.rstrip("/").partition("/")
        if not name:
            raise _wrong(kind, "has no name of the service that the Sentinels watch")
        return unquote(name), _db(kind, number or "0")
    db = _db(kind, path.strip("/") or option or "0")
    if kind == "cluster" and db:
        raise _wrong(kind, "names a database, and a cluster has only one")
    return "", db


def _db(kind: Kind, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise _wrong(kind, "has a database that is no number")
    return int(text)


def _wrong(kind: Kind, fault: str) -> ValueError:
    return ValueError(f"The store URL {fault}. One that is right: {_EXAMPLES[kind]}.")
