"""Image towers that another library runs: exported once, kept in a folder, and never used unseen."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import shutil
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from core.errors import EncoderUnavailable, reason

from . import onnx_tower, openvino_tower
from .torch_tower import Tower

_FORM = 1
"""Of what is kept; another one makes its own."""


class Library(Protocol):
    """A module that exports towers and runs what it exported."""

    PACKAGES: tuple[str, ...]
    DTYPES: dict[torch.dtype, str]

    def export(self, tower: nn.Module, example: UInt8[Tensor, "n 3 h w"], folder: Path, /) -> None:
        """Write a tower of any number of pictures to a folder."""

    def load(self, folder: Path, /, *, dtype: torch.dtype, threads: int) -> Tower:
        """Return the tower that was written to a folder."""


LIBRARIES: dict[str, Library] = {"openvino": openvino_tower, "onnx": onnx_tower}


def check_installed(backend: str) -> None:
    """Return if the backend's packages are there.

    Raises:
        EncoderUnavailable: one is missing.
    """
    missing = [package for package in LIBRARIES[backend].PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise EncoderUnavailable(
            f"The encoder backend {backend} was asked for, but the package {missing[0]} is missing; install it with: "
            "pip install 'dmn-clip-service[cpu]'."
        )


def kept_tower(
    backend: str,
    tower: nn.Module,
    example: UInt8[Tensor, "n 3 h w"],
    fingerprint: str,
    *,
    folder: Path,
    dtype: torch.dtype,
    check: Callable[[Tower], None],
) -> Tower:
    """Return the tower as the backend runs it: the one that is kept in the folder, if it still passes the check.

    One process at a time looks and makes; others wait and find it made. A name appears when what it names is whole, and
    what does not load or pass is made anew.

    Raises:
        EncoderUnavailable: the folder cannot be written, or a tower that was just made does not load or pass.
    """
    library = LIBRARIES[backend]
    place = folder / "towers" / _name(backend, fingerprint, dtype)
    made = place.with_name(place.name + ".part")

    def loaded(where: Path) -> Tower:
        found = library.load(where, dtype=dtype, threads=torch.get_num_threads())
        check(found)
        return found

    with _alone(backend, place):
        # Whatever is wrong with what is kept, the cure is the same.
        with contextlib.suppress(Exception):
            return loaded(place)
        try:
            for stale in (place, made):
                shutil.rmtree(stale, ignore_errors=True)
            made.mkdir()
            # Tracing warns of every number that it takes for a constant; the check tells whether one is not.
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                library.export(tower, example, made)
            fresh = loaded(made)
            made.rename(place)
        except (EncoderUnavailable, OSError):
            raise
        except Exception as error:
            raise EncoderUnavailable(
                f"The encoder backend {backend} cannot run this model ({reason(error)}); choose another."
            ) from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return fresh


def _name(backend: str, fingerprint: str, dtype: torch.dtype) -> str:
    """Return a name that differs where the exported tower may, or what is found to be wrong with it."""
    library = LIBRARIES[backend]
    versions = [f"{package}-{version(package)}" for package in ("torch", *library.PACKAGES)]
    return "_".join([fingerprint[:32], library.DTYPES[dtype], str(_FORM), *versions])


@contextlib.contextmanager
def _alone(backend: str, place: Path) -> Iterator[None]:
    """Hold the place's lock; one that a killed process held is free again."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.with_name(place.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise EncoderUnavailable(
            f"The encoder backend {backend} keeps its towers in {place.parent}, which cannot be written "
            f"({error.strerror}); name another folder."
        ) from error
