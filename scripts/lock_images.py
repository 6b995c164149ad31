"""Pins what the images install, with hashes: `docker/requirements`. Run it in the environment that the tests ran in.

    pip install uv && python scripts/lock_images.py

Whatever is installed beside this script is pinned as it is, so that images ship what was tested; the rest is the
newest. `uv` reads the index that `UV_DEFAULT_INDEX` names, PyPI if none. The image for CPUs has torch from another
index, whose hashes are written if `--torch-index` names it and it can be reached; else its versions alone are.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docker" / "requirements"
PYTHON = "3.11"

EXTRAS = {"cpu": ("lite", "embedded", "cpu", "otel"), "cuda": ("lite", "embedded", "otel")}
"""What of `pyproject.toml` each image has, beside what the service needs anyway."""

TORCH = ("torch", "torchvision")
OF_CUDA = ("nvidia-", "cuda-", "triton")
"""How the names start of what torch needs on GPUs alone."""

_HEADER = "# Written by scripts/lock_images.py for Python {python} on Linux, amd64.\n"


def main() -> None:
    """Write all lists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-index", help="index of torch for CPUs, to take hashes from")
    torch_index = parser.parse_args().torch_index
    with tempfile.TemporaryDirectory() as name:
        tested = Path(name) / "tested.txt"
        tested.write_text("".join(f"{one.name}=={one.version}\n" for one in distributions() if _public(one.version)))
        project = str(ROOT / "pyproject.toml")
        cuda = compiled(project, *_options("cuda", tested))
        write("cuda", cuda)
        without = [name for name in pinned(cuda) if name in TORCH or name.startswith(OF_CUDA)]
        cpu = [part for one in without for part in ("--no-emit-package", one)]
        write("cpu", compiled(project, *_options("cpu", tested), *cpu))
        write("torch", torch_lines(pinned(cuda), torch_index, Path(name)))
        builders = Path(name) / "build.in"
        builders.write_text("hatchling>=1.27\n")
        write("build", compiled(str(builders), "--constraint", str(tested)))


def compiled(source: str, *options: str) -> str:
    """Return the pinned requirements of a file, each with the hashes of all its files."""
    command = (
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--no-header",
        "--no-annotate",
        "--generate-hashes",
    )
    where = ("--python-version", PYTHON, "--python-platform", "x86_64-manylinux_2_28", "--only-binary", ":all:")
    told = subprocess.run([*command, *where, *options, source], stdout=subprocess.PIPE, text=True, check=True)
    return told.stdout


def pinned(text: str) -> dict[str, str]:
    """Return the versions of a list, by name."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE))


def torch_lines(versions: dict[str, str], index: str | None, folder: Path) -> str:
    """Return the requirements of torch for CPUs, with hashes if there is an index to take them from."""
    lines = "".join(f"{name}=={versions[name]}\n" for name in TORCH)
    if index is None:
        return lines
    wanted = folder / "torch.in"
    wanted.write_text(lines)
    return compiled(str(wanted), "--no-deps", "--default-index", index)


def write(name: str, text: str) -> None:
    """Write one list."""
    (FOLDER / f"{name}.txt").write_text(_HEADER.format(python=PYTHON) + text)


def _options(image: str, tested: Path) -> Sequence[str]:
    extras: Iterable[str] = (part for extra in EXTRAS[image] for part in ("--extra", extra))
    return ("--constraint", str(tested), *extras)


def _public(version: str) -> bool:
    """Return whether an index may have a version: one with a `+` was built for some machine."""
    return "+" not in version


if __name__ == "__main__":
    main()
