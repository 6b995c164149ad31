"""Change one hundred places of the source, one at a time, and count the changes that a test notices.

    python scripts/mutation_testing.py cover COVERAGE          # which test files run which lines (pytest-cov)
    python scripts/mutation_testing.py draw COVERAGE CHANGES   # draw the changes, by a fixed seed
    python scripts/mutation_testing.py run COVERAGE CHANGES RESULTS [--known RESULTS --files N --jobs 2]

A change swaps an operator or a comparison, moves a number by one, inverts a boolean, or deletes a statement, in `core`,
`service` or a Lua script, on a line that tests run. Each change is tried on a copy of the repository with the test
files that run its line, the closest first, until one fails. `--known` names the results of an earlier run: the test
that noticed a change then is tried first. `--files N` tries no more than the N closest files. Tests that start
processes of their own are left out: coverage does not see those.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
IN_PROCESS = ("tests/unit", "tests/golden", "tests/property", "tests/contract", "tests/integration")
COUNT, SEED = 100, 16
LUA_SHARE = 0.1
"""Share of the changes that is drawn from Lua scripts."""

LIMIT_S = 900.0
"""A change whose tests take longer hangs them: it counts as noticed."""

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_LUA = ((r" == ", " ~= "), (r" ~= ", " == "), (r" < ", " <= "), (r" > ", " >= "), (r" \+ ", " - "), (r" and ", " or "))


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change: in a file, these lines, from `line` on, become those."""

    path: str
    line: int
    before: str
    after: str


# Which lines tests run ------------------------------------------------------------------------------------------------


class Contexts:
    """Pytest plugin: coverage notes for every line the test file that runs it."""

    def pytest_runtest_setup(self, item: object) -> None:
        """Name the file of the next test to coverage."""
        import coverage  # noqa: PLC0415 - of the `cover` extra

        if (current := coverage.Coverage.current()) is not None:
            current.switch_context(str(getattr(item, "nodeid", "")).split("::")[0])


def cover(data: Path) -> int:
    """Run the tests under branch coverage and return pytest's exit status."""
    import pytest  # noqa: PLC0415 - loaded once torch may be

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "coverage.ini"
        config.write_text(f"[run]\nbranch = True\nsource = core\n  service\ndata_file = {data.resolve()}\n")
        options = ["--cov", f"--cov-config={config}", "--cov-report=term", "-q", "--timeout", "600"]
        return int(pytest.main([*IN_PROCESS, *options], plugins=[Contexts()]))


def running(data: Path) -> dict[str, dict[int, list[str]]]:
    """Return for every source file and line the test files that run it."""
    from coverage import CoverageData  # noqa: PLC0415 - of the `cover` extra

    records = CoverageData(str(data))
    records.read()
    lines: dict[str, dict[int, list[str]]] = {}
    for name in records.measured_files():
        path = re.sub(r"^.*/(?=(core|service)/)", "", name)
        by_line = records.contexts_by_lineno(name)
        lines[path] = {line: sorted(filter(None, contexts)) for line, contexts in by_line.items()}
    return lines


# Drawing changes ------------------------------------------------------------------------------------------------------


def draw(data: Path) -> list[Change]:
    """Return the changes that the seed chooses among all that are possible on lines that tests run."""
    lines, random = running(data), Random(SEED)
    python = [
        change
        for path in sorted((*ROOT.glob("core/**/*.py"), *ROOT.glob("service/**/*.py")))
        for change in python_changes(path.relative_to(ROOT).as_posix(), path.read_text())
        if lines.get(change.path, {}).get(change.line)
    ]
    lua = [
        change
        for path in sorted(ROOT.glob("service/**/*.lua"))
        for change in lua_changes(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    scripts = round(COUNT * LUA_SHARE)
    return random.sample(python, COUNT - scripts) + random.sample(lua, scripts)


def python_changes(path: str, source: str) -> Iterator[Change]:
    """Yield every change of a Python file."""
    tree, text = ast.parse(source), source.encode().splitlines(keepends=True)
    for node in ast.walk(tree):
        replacement = _replacement(node)
        if replacement is None or not hasattr(node, "lineno"):
            continue
        first, last = node.lineno - 1, node.end_lineno - 1
        head, tail = text[first][: node.col_offset], text[last][node.end_col_offset :]
        before = b"".join(text[first : last + 1]).decode()
        after = (head + replacement.encode() + tail).decode()
        yield Change(path=path, line=node.lineno, before=before, after=after)


def _replacement(node: ast.AST) -> str | None:  # noqa: PLR0911 - one for each kind of change
    """Return the text that takes the place of a node; None for one that is left alone."""
    match node:
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign():
            return "pass"
        case ast.Compare(ops=[op]) if type(op) in _SWAPS:
            return f"({ast.unparse(ast.Compare(node.left, [_SWAPS[type(op)]()], node.comparators))})"
        case ast.BinOp(op=op) if type(op) in _SWAPS:
            return f"({ast.unparse(ast.BinOp(node.left, _SWAPS[type(op)](), node.right))})"
        case ast.BoolOp(op=op):
            return f"({ast.unparse(ast.BoolOp(_SWAPS[type(op)](), node.values))})"
        case ast.UnaryOp(op=ast.Not()):
            return f"(not not {ast.unparse(node.operand)})"
        case ast.Constant(value=bool(value)):
            return str(not value)
        case ast.Constant(value=int(value) | float(value)):
            return str(value + 1)
    return None


def lua_changes(path: str, source: str) -> Iterator[Change]:
    """Yield every change of a Lua script."""
    for number, line in enumerate(source.splitlines(keepends=True), 1):
        if line.lstrip().startswith("--"):
            continue
        code = line.partition("--")[0]
        for pattern, text in _LUA:
            for place in re.finditer(pattern, code):
                yield Change(
                    path=path, line=number, before=line, after=line[: place.start()] + text + line[place.end() :]
                )
        for place in re.finditer(r"\b\d+\b", code):
            after = line[: place.start()] + str(int(place[0]) + 1) + line[place.end() :]
            yield Change(path=path, line=number, before=line, after=after)
        if re.fullmatch(r"\s*redis\.call\(.*\)\s*", code):
            yield Change(path=path, line=number, before=line, after="\n")


# Trying them ----------------------------------------------------------------------------------------------------------


def test_files(change: Change, lines: dict[str, dict[int, list[str]]]) -> list[str]:
    """Return the test files that run a change's line, those named for the module first, then unit before the rest."""
    if change.path.endswith(".lua"):
        files = {
            file for file in _all_test_files() if file.startswith(("tests/contract/", "tests/property/test_write"))
        }
    else:
        files = set(lines.get(change.path, {}).get(change.line, ()))
    stem = Path(change.path).stem
    order = {folder: number for number, folder in enumerate(IN_PROCESS)}
    present = [file for file in files if (ROOT / file).exists()]
    return sorted(present, key=lambda file: (stem not in Path(file).stem, order["/".join(file.split("/")[:2])], file))


def _all_test_files() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for folder in IN_PROCESS for path in ROOT.glob(f"{folder}/**/test_*.py")]


def attempt(change: Change, selected: list[str], copy: Path) -> str | None:
    """Return the test that notices a change in a copy of the repository, `hangs`, or None if none does."""
    target = copy / change.path
    original = target.read_text()
    text = changed(original, change)
    if text is None:
        return "gone"
    target.write_text(text)
    report = copy / "noticed"
    report.unlink(missing_ok=True)
    # A fork of this process has torch loaded already.
    child = multiprocessing.get_context("fork").Process(target=_run_tests, args=(copy, selected, report))
    try:
        child.start()
        child.join(LIMIT_S)
        if child.is_alive():
            child.kill()
            child.join()
            return "hangs"
        return report.read_text() if report.exists() else None
    finally:
        target.write_text(original)


def changed(text: str, change: Change) -> str | None:
    """Return a file's text with the change, at the place nearest to its line; None if what it changes is not there."""
    places = [place.start() for place in re.finditer(re.escape(change.before), text)]
    places = [place for place in places if place == 0 or text[place - 1] == "\n"]
    if not places:
        return None
    nearest = min(places, key=lambda place: abs(text.count("\n", 0, place) + 1 - change.line))
    return text[:nearest] + change.after + text[nearest + len(change.before) :]


class _Noticed:
    """Pytest plugin: writes down the first test that fails."""

    def __init__(self, report: Path) -> None:
        self._report = report

    def pytest_runtest_logreport(self, report: object) -> None:
        """Write the test's name if it failed."""
        if getattr(report, "failed", False):
            self._report.write_text(str(getattr(report, "nodeid", "?")))

    def pytest_collectreport(self, report: object) -> None:
        """Write the file's name if it cannot be imported."""
        self.pytest_runtest_logreport(report)


def _run_tests(copy: Path, selected: list[str], report: Path) -> None:
    import pytest  # noqa: PLC0415 - loaded once torch may be

    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path[0] = str(copy)
    sys.dont_write_bytecode = True
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "--timeout", "60", "--rootdir", str(copy)]
    try:
        status = pytest.main([*selected, *options], plugins=[_Noticed(report)])
    except BaseException as error:  # noqa: BLE001 - a change may raise anything, also where pytest is configured
        report.write_text(f"pytest ended with {type(error).__name__}")
    else:
        if status not in (0, 5) and not report.exists():
            report.write_text(f"pytest ended with status {int(status)}")
    os._exit(0)


def run(data: Path, changes: list[Change], results: Path, known: Path | None, *, jobs: int, most: int | None) -> None:
    """Try every change and write down what notices it."""
    import torch  # noqa: F401, PLC0415 - loaded once, for all forks

    lines = running(data)
    earlier = {row["number"]: row["noticed_by"] for row in json.loads(known.read_text())} if known else {}
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="dmn-mutation-") as folder, ThreadPoolExecutor(jobs) as pool:
        copies = [Path(folder) / str(number) for number in range(jobs)]
        for copy in copies:
            ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
            shutil.copytree(ROOT, copy, ignore=ignored)
        free = list(copies)

        def one(number: int, change: Change) -> dict[str, object]:
            copy = free.pop()
            try:
                first = str(earlier.get(number) or "")
                noticed = None
                if first.startswith("tests/") and (ROOT / first.split("::", maxsplit=1)[0]).exists():
                    noticed = attempt(change, [first], copy)
                if noticed is None or noticed.startswith("pytest ended"):
                    files = test_files(change, lines)[:most]
                    noticed = attempt(change, files, copy) if files else None
            finally:
                free.append(copy)
            return {"number": number, **asdict(change), "noticed_by": noticed}

        for number, row in enumerate(pool.map(one, range(len(changes)), changes)):
            rows.append(row)
            results.write_text(json.dumps(rows, indent=1))
            print(f"{number:3} {row['path']}:{row['line']}  {row['noticed_by'] or 'NOT NOTICED'}", flush=True)
    print(f"{sum(bool(row['noticed_by']) for row in rows)} of {len(rows)} changes are noticed")


def main() -> int:
    """Do what the command line asks for and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("cover", "draw", "run"):
        command = commands.add_parser(name)
        command.add_argument("coverage", type=Path)
        if name != "cover":
            command.add_argument("changes", type=Path)
        if name == "run":
            command.add_argument("results", type=Path)
            command.add_argument("--known", type=Path)
            command.add_argument("--jobs", type=int, default=2)
            command.add_argument("--files", type=int)
    given = parser.parse_args()
    if given.command == "cover":
        return cover(given.coverage)
    if given.command == "draw":
        given.changes.write_text(json.dumps([asdict(change) for change in draw(given.coverage)], indent=1))
        return 0
    changes = [Change(**row) for row in json.loads(given.changes.read_text())]
    run(given.coverage, changes, given.results, given.known, jobs=given.jobs, most=given.files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
