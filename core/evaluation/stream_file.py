"""Stream files: features, labels and class weights of a recorded stream, in one NumPy archive."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from dataclasses import replace as dc_replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from core.errors import InvalidFeature, InvalidStream
from core.numerics import checked_unit
from core.readout.projection import Projection
from core.snapshot import DEFAULT_BETA, DEFAULT_SLOTS

DEFAULT_TAU = 100.0

_UNREADABLE = (OSError, ValueError, EOFError, KeyError, NotImplementedError, MemoryError, BadZipFile, zlib.error)
"""What numpy and zipfile raise on files that are damaged or something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """What a stream file holds, checked and with unit-norm features; `labels` and `projection` may be absent."""

    text: Float[Tensor, "c d"]
    features: Float[Tensor, "n v d"]
    labels: Int[Tensor, " n"] | None
    shots: Float[Tensor, "m d"]
    shot_labels: Int[Tensor, " m"]
    classnames: tuple[str, ...]
    projection: Projection | None
    slots: int
    beta: float
    tau: float

    def taken(self, order: Int[Tensor, " m"]) -> Stream:
        """Return the stream of these images, in this order."""
        labels = None if self.labels is None else self.labels[order]
        return dc_replace(self, features=self.features[order], labels=labels)


def load_stream(path: Path) -> Stream:
    """Return the stream in an `.npz` file.

    Raises:
        InvalidStream: the file cannot be read, or an array is missing or does not fit the others.
    """
    arrays = _read(path)
    for name in ("text", "features"):
        if name not in arrays:
            raise InvalidStream(f"{path} has no array {name!r}.")
    try:
        return _stream(arrays)
    except InvalidFeature as error:
        raise InvalidStream(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with path.open("rb") as raw:
            loaded = np.load(raw, allow_pickle=False)
            arrays = {name: loaded[name] for name in loaded.files} if isinstance(loaded, NpzFile) else {}
    except _UNREADABLE as error:
        raise InvalidStream(f"{path} cannot be read as a stream (.npz without pickled objects): {error}") from error
    if not arrays or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise InvalidStream(f"{path} is no archive of arrays (.npz).")
    return arrays


def _stream(arrays: Mapping[str, NDArray[np.generic]]) -> Stream:
    text = _features(arrays, "text", ndim=(2,))
    classes, dim = text.shape
    features = _features(arrays, "features", ndim=(2, 3), dim=dim)
    shots = _features(arrays, "shots", ndim=(2,), dim=dim) if "shots" in arrays else text.new_empty(0, dim)
    if ("shots" in arrays) != ("shot_labels" in arrays):
        raise InvalidStream("A stream has either both of 'shots' and 'shot_labels' or neither.")
    return Stream(
        text=text,
        features=features if features.ndim == 3 else features[:, None],  # noqa: PLR2004
        labels=_labels(arrays, "labels", len(features), classes) if "labels" in arrays else None,
        shots=shots,
        shot_labels=_labels(arrays, "shot_labels", len(shots), classes) if len(shots) else torch.empty(0).long(),
        classnames=_names(arrays, classes),
        projection=_projection(arrays, classes, dim),
        slots=int(_scalar(arrays, "slots", float(DEFAULT_SLOTS), least=0.0)),
        beta=_scalar(arrays, "beta", DEFAULT_BETA, least=0.0),
        tau=_scalar(arrays, "logit_scale", DEFAULT_TAU, least=0.0),
    )


def _numbers(arrays: Mapping[str, NDArray[np.generic]], name: str, ndim: tuple[int, ...]) -> Tensor:
    array = arrays[name]
    if array.dtype.kind not in "fiu" or array.ndim not in ndim or array.size == 0:
        shape = " or ".join(str(n) for n in ndim)
        raise InvalidStream(
            f"Array {name!r} has type {array.dtype} and shape {array.shape}; expected numbers in {shape} dimensions, "
            "not empty."
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        return torch.from_numpy(array.astype(np.float32))


def _features(
    arrays: Mapping[str, NDArray[np.generic]], name: str, *, ndim: tuple[int, ...], dim: int | None = None
) -> Tensor:
    return checked_unit(_numbers(arrays, name, ndim), dim=dim, what=f"row of {name!r}")


def _labels(arrays: Mapping[str, NDArray[np.generic]], name: str, count: int, classes: int) -> Tensor:
    array = arrays[name]
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise InvalidStream(
            f"Array {name!r} has type {array.dtype} and shape {array.shape}; expected {count} integers."
        )
    if count and (array.min() < 0 or array.max() >= classes):
        raise InvalidStream(f"Array {name!r} holds labels outside 0 to {classes - 1}.")
    return torch.from_numpy(array.astype(np.int64))


def _names(arrays: Mapping[str, NDArray[np.generic]], classes: int) -> tuple[str, ...]:
    if "classnames" not in arrays:
        return tuple(str(c) for c in range(classes))
    names = arrays["classnames"]
    if names.dtype.kind not in "US" or names.shape != (classes,):
        raise InvalidStream(
            f"Array 'classnames' has type {names.dtype} and shape {names.shape}; expected {classes} names."
        )
    return tuple(str(name) for name in names.tolist())


def _projection(arrays: Mapping[str, NDArray[np.generic]], classes: int, dim: int) -> Projection | None:
    given = {field.name for field in fields(Projection) if f"projection_{field.name}" in arrays}
    if not given:
        return None
    offsets = {field.name: torch.zeros(classes, dim) for field in fields(Projection)}
    for name in given:
        offset = _numbers(arrays, f"projection_{name}", (2,))
        if offset.shape != (classes, dim) or not torch.isfinite(offset).all():
            raise InvalidStream(f"Array 'projection_{name}' must hold {classes} x {dim} finite numbers.")
        offsets[name] = offset
    return Projection(**offsets)


def _scalar(arrays: Mapping[str, NDArray[np.generic]], name: str, default: float, *, least: float) -> float:
    if name not in arrays:
        return default
    array = arrays[name]
    if (
        array.size != 1
        or array.dtype.kind not in "fiu"
        or not np.isfinite(value := float(array.item()))
        or value < least
    ):
        raise InvalidStream(f"Scalar {name!r} must be one finite number, at least {least:g}.")
    return value
