"""`scripts/audit.py` fails on what can be mended, and on nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.audit import COMMAND, NotAudited, audit, main

FINE = {"name": "attrs", "version": "25.1.0", "vulns": []}
SKIPPED = {"name": "own", "skip_reason": "Dependency not found on PyPI and could not be audited: own (0.1.0)"}
ADVISORY = {
    "id": "PYSEC-2021-865",
    "aliases": ["CVE-2021-28363", "GHSA-q2q7-5pp4-w6pg"],
    "description": "A certificate is not checked.",
    "fix_versions": ["1.26.4"],
}
BROKEN = {"name": "urllib3", "version": "1.26.3", "vulns": [ADVISORY]}
UNFIXED = {
    "name": "pip",
    "version": "25.0",
    "vulns": [{**ADVISORY, "id": "PYSEC-1", "aliases": [], "fix_versions": []}],
}
NO_NETWORK = (
    "ERROR:pip_audit._cli:HTTPSConnectionPool(host='pypi.org', port=443): Max retries exceeded with url: "
    "/pypi/attrs/25.1.0/json (Caused by NewConnectionError('Connection refused'))"
)


def says(*packages: Any, status: int = 0, err: str = "") -> list[str]:
    """Return a command that says what pip-audit says of packages, or that it failed."""
    out = json.dumps({"dependencies": packages, "fixes": []}) if packages else ""
    text = f"import sys; sys.stdout.write({out!r}); sys.stderr.write({err!r}); sys.exit({status})"
    return [sys.executable, "-I", "-S", "-c", text]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    file = tmp_path / "pyproject.toml"
    file.write_text("[tool.ruff]\n")
    return file


def test_what_has_no_known_vulnerability_passes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(says(FINE, SKIPPED, err="No known vulnerabilities found\n"), project) == 0
    assert capsys.readouterr().out == "0 known vulnerabilities have a fix; 0 others are known.\n"


def test_a_vulnerability_that_has_a_fix_fails_and_the_table_names_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = says(FINE, BROKEN, status=1, err="Found 1 known vulnerability in 1 package\n")
    assert main(command, project) == 1
    told = capsys.readouterr().out
    for word in ("urllib3", "1.26.3", "1.26.4", "PYSEC-2021-865", "update it"):
        assert word in told


def test_one_that_has_none_is_told_and_passes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(says(FINE, UNFIXED, status=1), project) == 0
    assert "no fix yet" in capsys.readouterr().out


@pytest.mark.parametrize("own", ["PYSEC-2021-865", "CVE-2021-28363"])
def test_one_that_is_ignored_passes_with_its_reason(
    project: Path, capsys: pytest.CaptureFixture[str], own: str
) -> None:
    project.write_text(f'[tool.audit.ignore]\n{own} = "not called"\n')
    assert main(says(FINE, BROKEN, status=1), project) == 0
    assert "not called" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (says(status=1, err=NO_NETWORK), "Connection refused"),
        (says(SKIPPED, err="No known vulnerabilities found\n"), "knows none of the packages"),
        (says(status=2), "told nothing"),
        ([sys.executable, "-I", "-S", "-c", "print('<html>')"], "told nothing"),
    ],
)
def test_where_the_service_tells_nothing_one_sentence_says_so_and_it_passes(
    project: Path, capsys: pytest.CaptureFixture[str], command: list[str], why: str
) -> None:
    assert main(command, project) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Not audited: the advisory service could not be reached")
    assert why in line


def test_a_service_that_does_not_answer_is_waited_for_until_the_deadline_only() -> None:
    waits = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read(); __import__('time').sleep(600)"]
    with pytest.raises(NotAudited, match=r"within 0\.5 s"):
        audit(waits, deadline_s=0.5)


@pytest.mark.slow
def test_the_real_pip_audit_takes_its_options_and_a_service_that_is_not_there_is_no_failure(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = "http://127.0.0.1:1"
    real = (sys.executable, "-m", "pip_audit", *COMMAND, "--vulnerability-service", "osv", "--osv-url", nobody)
    assert main(real, project) == 0
    assert capsys.readouterr().out.startswith("Not audited: ")
