"""Whether `/openapi.json` is true.

[Schemathesis](https://schemathesis.readthedocs.io) asks a running service, `dmn serve` with a real store, what the
document says that it may be asked, and what it says that it may not, and holds every answer to the document, with all
its checks. It does so in three forms: without keys, with the operator's key, and with a tenant's. What it is taught,
and which of its complaints are none, is in `contract_hooks.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.settings import DEFAULT_TENANT
from service.stores.embedded.binary import find_binary
from tests.soak.report import tell
from tests.support.fakes import COLOURS, picture
from tests.support.process import DMN, PATIENCE_S, ROOT, Service
from tests.support.servers import server

BINARY = find_binary()

FORMS = ("open", "operator", "tenant")
"""Without keys; with the operator's key; with the key of a tenant that has every scope of a tenant."""

MEMORY = "DMN_CONTRACT_MEMORY"
"""Variable that names a file with an exported memory, for the hooks."""

OWN_TENANT = "DMN_CONTRACT_TENANT"
"""Variable that names the tenant that is asked for, the same."""

TENANT = "shop"
TEXT_CHARS = 40

EXAMPLES = {"short": 2, "long": 500}
"""Calls of each operation, at most, a phase: the same ones each time, from one seed."""

LONG_S = 240

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


@pytest.mark.skipif(BINARY is None, reason="no Valkey or Redis server is installed")
@pytest.mark.parametrize("form", FORMS)
def test_every_answer_is_as_the_document_says(form: str, tmp_path: Path, scale: str) -> None:
    told = tmp_path / "report.json"
    with _served(form) as (service, key):
        memory = tmp_path / "memory.safetensors"
        memory.write_bytes(_furnished(service.client, key, _tenant(form)))
        config = tmp_path / "schemathesis.toml"
        config.write_text(_config(form, key))
        limit = ["--max-time", str(LONG_S)] if scale == "long" else []
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
                *("run", f"{service.url}/openapi.json", "--checks", "all", "--continue-on-failure"),
                *("--max-examples", str(EXAMPLES[scale]), "--seed", "0", "--generation-database", "none"),
                *("--no-color", "--output-sanitize", "false", "--report", "json", "--report-json-path", str(told)),
                *limit,
            ],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SCHEMATHESIS_HOOKS": "tests.soak.contract_hooks",
                MEMORY: str(memory),
                OWN_TENANT: _tenant(form),
            },
            text=True,
            capture_output=True,
            check=False,
        )
    said = f"{done.stdout}\n{done.stderr}"
    assert told.exists(), said[-_TAIL:]
    report = json.loads(told.read_text())
    operations, cases = report["operations"]["tested"], report["test_cases"]["generated"]
    figures = {"operations": operations, "cases": cases, "filtered": report["filtered"]}
    tell(f"contract, {form}", figures | {"seconds": round(report["running_time"], 1)})
    assert not report["failures"], said
    assert not report["errors"], said
    assert report["complete"], said
    assert done.returncode == 0, said
    assert operations >= 34
    assert cases > 300


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
def _served(form: str) -> Iterator[tuple[Service, str]]:
    """Run a service of a form; and the key to ask it with."""
    keys = {} if form == "open" else {"DMN_AUTH": "keys", "DMN_OPERATOR_KEY": _OPERATOR_KEY}
    own = {"DMN_DRAIN_DELAY_S": "0", "DMN_STORE_TIMEOUT_MS": "60000", **_SMALL, **keys}
    assert BINARY is not None
    with server(BINARY) as store, Service("fake", store=store.url, **own).running() as service:
        yield service, _key(form, store.url)


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


def _furnished(client: httpx.Client, key: str, tenant: str) -> bytes:
    """Give a tenant classes, shots and slots, and return its memory as a file."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client.put(f"/tenants/{tenant}", json={"classes": list(COLOURS)}, headers=headers).raise_for_status()
    for colour in COLOURS:
        images = [("images", (f"{seed}.png", picture(colour, seed))) for seed in range(2)]
        client.post("/memory/static", data={"label": colour}, files=images, headers=headers).raise_for_status()
        client.post("/classify", files=images, headers=headers).raise_for_status()
    return client.get("/admin/memory/export", headers=headers).raise_for_status().content
