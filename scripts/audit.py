"""Ask whether what is installed has known vulnerabilities: `python scripts/audit.py`; part of `make check`.

Runs pip-audit, which asks the advisory service of the package index. Status 1 if one is known that has a fix: the table
says which release brings it. What cannot be helped yet stands in `[tool.audit.ignore]` of pyproject.toml, each by its
id and with a reason. Where the service cannot be reached, or knows none of the packages, one sentence says so, and the
status is 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

DEADLINE_S = 30.0
COMMAND = ("--format", "json", "--progress-spinner", "off", "--timeout", "10", "--skip-editable")
PROJECT = Path(__file__).parents[1] / "pyproject.toml"

_FINDS = (0, 1)
"""Statuses of pip-audit that come with a report: nothing was found, or something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advisory:
    """A known vulnerability of a package that is installed; `fixes` are releases without it, and may be none."""

    package: str
    version: str
    id: str
    aliases: Sequence[str]
    fixes: Sequence[str]

    def is_any(self, ids: Mapping[str, str]) -> bool:
        """Return whether one of these ids means it."""
        return any(one in ids for one in (self.id, *self.aliases))


class NotAudited(Exception):
    """The advisory service told nothing; the message says why."""


def audit(command: Sequence[str], deadline_s: float = DEADLINE_S) -> list[Advisory]:
    """Run pip-audit, and return what it finds.

    Raises:
        NotAudited: it could not reach the advisory service, in time, or that knows none of the packages.
    """
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotAudited(f"no answer within {deadline_s:g} s") from error
    try:
        packages = json.loads(ran.stdout)["dependencies"] if ran.returncode in _FINDS else []
    except (ValueError, KeyError, TypeError):
        packages = []
    return _advisories(packages, ran.stderr)


def _advisories(packages: Sequence[Mapping[str, Any]], said: str) -> list[Advisory]:
    audited = [one for one in packages if "vulns" in one]
    if not audited:
        lines = said.strip().splitlines()
        raise NotAudited("it knows none of the packages" if packages else (lines[-1:] or ["it told nothing"])[0])
    return [
        Advisory(
            package=one["name"],
            version=one["version"],
            id=told["id"],
            aliases=told["aliases"],
            fixes=told["fix_versions"],
        )
        for one in audited
        for told in one["vulns"]
    ]


def judge(advisories: Sequence[Advisory], ignored: Mapping[str, str]) -> list[Advisory]:
    """Return those that have to be mended: a fix is there, and nobody said why it may wait."""
    return [one for one in advisories if one.fixes and not one.is_any(ignored)]


def main(command: Sequence[str] = (sys.executable, "-m", "pip_audit", *COMMAND), project: Path = PROJECT) -> int:
    """Print what is known, and return the status of the command."""
    ignored = tomllib.loads(project.read_text()).get("tool", {}).get("audit", {}).get("ignore", {})
    try:
        found = audit(command)
    except NotAudited as error:
        print(f"Not audited: the advisory service could not be reached ({error}).")
        return 0
    due = judge(found, ignored)
    if found:
        Console().print(_table(found, due, ignored))
    print(f"{len(due)} known vulnerabilities have a fix; {len(found) - len(due)} others are known.")
    return 1 if due else 0


def _table(found: Sequence[Advisory], due: Sequence[Advisory], ignored: Mapping[str, str]) -> Table:
    table = Table("package", "version", "advisory", "fixed in", "so")
    for one in found:
        reasons = [ignored[own] for own in (one.id, *one.aliases) if own in ignored]
        so = "update it" if one in due else reasons[0] if reasons else "no fix yet"
        table.add_row(one.package, one.version, ", ".join((one.id, *one.aliases)), ", ".join(one.fixes), so)
    return table


if __name__ == "__main__":
    sys.exit(main())
