"""Where labelled pictures come from: folders of class folders."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.prompts import DEFAULT_TEMPLATES
from service.domain.tenant import ClassSpec, class_name
from service.errors import InvalidRequest

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A file, the number of its class (None: it shows none of them), and of the domain that it comes from."""

    path: Path
    label: int | None
    domain: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Classes and their pictures. Shots are drawn from `train`; if it is None, from `test`, which then lacks them."""

    name: str
    classes: tuple[ClassSpec, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    test: tuple[Picture, ...]
    train: tuple[Picture, ...] | None = None

    @property
    def domains(self) -> int:
        """How many domains the pictures come from."""
        return 1 + max(picture.domain for picture in self.test)

    def drawn(self, shots: int, seed: int) -> tuple[list[Picture], list[Picture]]:
        """Return that many shots of each class, and the stream in shuffled order, as the seed draws them.

        Raises:
            InvalidRequest: the shots of a class would leave none of its pictures to classify.
        """
        rng = random.Random(seed)  # noqa: S311 - an order, no secret
        support: list[Picture] = []
        stream: list[Picture] = [] if self.train is None else list(self.test)
        for spec, own in zip(self.classes, self._by_class(), strict=True):
            if self.train is None and len(own) <= shots:
                raise InvalidRequest(
                    f"The class {spec.name!r} has {len(own)} files; --shots {shots} leaves none to classify."
                )
            mixed = rng.sample(own, len(own))
            support += mixed[:shots]
            stream += mixed[shots:] if self.train is None else []
        rng.shuffle(stream)
        return support, stream

    def _by_class(self) -> list[list[Picture]]:
        """Return the pictures that shots are drawn from, by class."""
        found: list[list[Picture]] = [[] for _ in self.classes]
        for picture in self.test if self.train is None else self.train:
            if picture.label is not None:
                found[picture.label].append(picture)
        return found


def class_folders(directories: Sequence[Path]) -> DataSet:
    """Return the pictures in folders of class folders, a domain each; all have the same classes.

    Raises:
        InvalidRequest: one of them holds no class folders with images, or other classes than the first.
    """
    found = [_folders(directory) for directory in directories]
    names = list(found[0])
    for directory, folders in zip(directories, found, strict=True):
        if other := min(set(folders) ^ set(names), default=None):
            raise InvalidRequest(
                f"{directories[0]} and {directory} do not have the same classes: only one of them has {other!r}."
            )
    pictures = (
        Picture(path=path, label=label, domain=domain)
        for domain, folders in enumerate(found)
        for label, name in enumerate(names)
        for path in folders[name]
    )
    return DataSet(
        name=", ".join(directory.resolve().name for directory in directories),
        classes=tuple(ClassSpec(name=name) for name in names),
        test=tuple(pictures),
    )


def pictures_under(directory: Path) -> list[Path]:
    """Return every picture in a folder and the folders below it.

    Raises:
        InvalidRequest: there is no such folder, or no picture in it.
    """
    if not directory.is_dir():
        raise InvalidRequest(f"{directory} is no folder.")
    files = images_in(directory)
    if not files:
        raise InvalidRequest(f"{directory} holds no images.")
    return files


def _folders(directory: Path) -> dict[str, list[Path]]:
    if not directory.is_dir():
        raise InvalidRequest(f"{directory} is no folder.")
    folders = {}
    for folder in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = images_in(folder)
        if files:
            name = class_name(folder.name)
            if name in folders:
                raise InvalidRequest(f"Two folders of {directory} are named {name!r}, apart from space and spelling.")
            folders[name] = files
    if not folders:
        raise InvalidRequest(f"{directory} holds no folders with images; each class needs one, named by the class.")
    return folders


def images_in(folder: Path) -> list[Path]:
    """Return every picture in a folder and the folders below it, by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
