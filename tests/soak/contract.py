"""Whether `/openapi.json` is true: `python -m tests.soak.contract [--examples 500 --seconds 240 --seed 0 --json]`.

[Schemathesis](https://schemathesis.readthedocs.io) asks a running service, `dmn serve` with a real store, what the
document says that it may be asked, and what it says that it may not, and holds every answer to the document, with all
its checks. It does so in three forms: without keys, with the operator's key, and with a tenant's. Status 1 if an answer
was not as it was documented. What it is taught, and which of its complaints are none, is in `contract_hooks.py`. The
short form is `tests/e2e/test_schemathesis.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from service.bench.telling import stamp
from service.settings import DEFAULT_TENANT
from service.stores.embedded import find_binary
from tests.support.fakes import COLOURS, picture
from tests.support.process import DMN, ROOT, Command
from tests.support.servers import server

FORMS = ("open", "operator", "tenant")
"""Without keys; with the operator's key; with the key of a tenant that has every scope of a tenant."""

MEMORY = "DMN_CONTRACT_MEMORY"
"""Variable that names a file with an exported memory, for the hooks."""

OWN_TENANT = "DMN_CONTRACT_TENANT"
"""Variable that names the tenant that is asked for, the same."""

TENANT = "shop"
TEXT_CHARS = 40
PATIENCE_S = 60.0

_OPERATOR_KEY = "the-key-of-the-operator"
_SCOPES = "classify,memory,admin,metrics"
_LEFT_OUT: Mapping[str, Sequence[tuple[str, str]]] = {
    # The tenant's keys go with it, so that every call after it would be refused; the other forms make this one.
    "tenant": [("DELETE", "/tenants/{tenant}")],
}
"""Operations that are not asked for in a form."""

_SMALL = {
    "DMN_MAX_IMAGES": "4",
    "DMN_MAX_VIEWS": "4",
    "DMN_MAX_CLASSES": "12",
    "DMN_MAX_PROMPTS": "8",
    "DMN_MAX_TEXT_CHARS": str(TEXT_CHARS),
    "DMN_MAX_SLOTS": "60",
}
"""Limits, each of which is tried from both sides: small, so that what is as large as it may be is soon made."""

_TAIL = 12_000


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came of one form: how many operations were asked, by how many calls, and what was not as documented."""

    form: str
    operations: int
    cases: int
    failures: int
    filtered: int
    seconds: float
    report: str

    @property
    def holds(self) -> bool:
        """Whether every operation was asked, and every answer was as documented."""
        return bool(self.operations and self.cases) and not self.failures


def contract(
    form: str, binary: str, *, examples: int, seconds: int | None = None, seed: int = 0, phases: Sequence[str] = ()
) -> Found:
    """Ask a service of a form for all that its document promises; `binary` is the server of its store.

    Raises:
        AssertionError: schemathesis itself failed; says how.
    """
    with TemporaryDirectory(prefix="dmn-contract-") as name, _served(form, binary) as (url, key):
        folder, told = Path(name), Path(name) / "report.json"
        memory = _furnished(url, key, _tenant(form))
        (folder / "memory.safetensors").write_bytes(memory)
        config = folder / "schemathesis.toml"
        config.write_text(_config(form, key))
        limit = [] if seconds is None else ["--max-time", str(seconds)]
        some = ["--phases", ",".join(phases)] if phases else []
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{url}/openapi.json"),
                *("--checks", "all", "--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure"),
                *("--no-color", "--generation-database", "none", "--output-sanitize", "false"),
                *("--report", "json", "--report-json-path", str(told), *limit, *some),
            ],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SCHEMATHESIS_HOOKS": "tests.soak.contract_hooks",
                MEMORY: str(folder / "memory.safetensors"),
                OWN_TENANT: _tenant(form),
            },
            text=True,
            capture_output=True,
            check=False,
        )
        assert told.exists(), f"{done.stdout}\n{done.stderr}"[-_TAIL:]
        return _found(form, json.loads(told.read_text()), done)


def _found(form: str, report: Mapping[str, Any], done: subprocess.CompletedProcess[str]) -> Found:
    unheard = len(report["errors"]) + (done.returncode not in (0, 1)) + (not report["complete"])
    return Found(
        form=form,
        operations=report["operations"]["tested"],
        cases=report["test_cases"]["generated"],
        failures=sum(one["count"] for one in report["failures"]) + unheard + bool(done.returncode),
        filtered=report["filtered"],
        seconds=round(report["running_time"], 1),
        report=done.stdout + done.stderr,
    )


def _config(form: str, key: str) -> str:
    """Return what schemathesis is told by file, which is what it cannot be told otherwise."""
    lines = [
        # A call with more images, or more bytes, than are allowed is refused with 413.
        "[checks.negative_data_rejection]",
        'expected-statuses = ["401", "403", "404", "405", "409", "413", "415", "422"]',
    ]
    if key:
        lines += ["[auth.openapi.key]", f'bearer = "{key}"']
    for method, path in _LEFT_OUT.get(form, ()):
        lines += ["[[operations]]", f'include-name = "{method} {path}"', "enabled = false"]
    return "\n".join(lines) + "\n"


# A service to ask -----------------------------------------------------------------------------------------------------


@contextmanager
def _served(form: str, binary: str) -> Iterator[tuple[str, str]]:
    """Run a service of a form; its URL, and the key to ask it with."""
    keys = {} if form == "open" else {"DMN_AUTH": "keys", "DMN_OPERATOR_KEY": _OPERATOR_KEY}
    with server(binary) as store:
        own = {"DMN_DRAIN_DELAY_S": "0", **_SMALL, **keys}
        with Command("fake", "serve", "--port", "0", store=store.url, **own) as command:
            url = command.url()
            yield url, _key(form, store.url)


def _key(form: str, store: str) -> str:
    """Return the key that a form asks with: '' where there are none."""
    if form != "tenant":
        return "" if form == "open" else _OPERATOR_KEY
    made = subprocess.run(
        [str(DMN), "keys", "create", "--tenant", TENANT, "--scope", _SCOPES],
        env={**os.environ, "DMN_STORE": store},
        text=True,
        capture_output=True,
        check=True,
        timeout=PATIENCE_S,
    )
    return made.stdout.strip()


def _tenant(form: str) -> str:
    """Return the tenant that calls of a form are for."""
    return TENANT if form == "tenant" else DEFAULT_TENANT


def _furnished(url: str, key: str, tenant: str) -> bytes:
    """Give a tenant classes, shots and slots, and return its memory as a file."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S, trust_env=False) as client:
        client.put(f"/tenants/{tenant}", json={"classes": list(COLOURS)}).raise_for_status()
        for colour in COLOURS:
            images = [("images", (f"{seed}.png", picture(colour, seed))) for seed in range(2)]
            client.post("/memory/static", data={"label": colour}, files=images).raise_for_status()
            client.post("/classify", files=images).raise_for_status()
        return client.get("/admin/memory/export").raise_for_status().content


# Telling --------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=500, help="calls of each operation, at most, a phase")
    parser.add_argument("--seconds", type=int, default=240, help="for each form")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--phases", nargs="+", default=(), help="of schemathesis; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    binary = find_binary()
    if binary is None:
        raise SystemExit("no Valkey or Redis server is installed")
    told = []
    for form in options.forms:
        found = contract(
            form,
            binary,
            examples=options.examples,
            seconds=options.seconds,
            seed=options.seed,
            phases=options.phases,
        )
        if not found.holds:
            print(found.report, file=sys.stderr)
        told.append(
            {name: getattr(found, name) for name in ("form", "operations", "cases", "failures", "filtered", "seconds")}
        )
    if options.json:
        print(json.dumps({"forms": told, **stamp()}, indent=2))
    else:
        print("\n".join(" ".join(f"{name} {value}" for name, value in one.items()) for one in told))
    return 1 if any(one["failures"] for one in told) else 0


if __name__ == "__main__":
    sys.exit(main())
