"""The data sets of the paper under one root, in the folders that are usual for them, with their prompts.

A root holds a folder a data set. Its labels come from a split file, `{"train": [[path, label, class name], ..],
"val": .., "test": ..}`, from lists of pictures (the aircraft), or from folders named by class (the ImageNets). A file
`descriptions.json`, `{class name: [sentence, ..]}`, may stand beside them: its sentences join the templates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from core.prompts import DEFAULT_TEMPLATES, prompts_of
from service.domain.tenant import ClassSpec, class_name
from service.errors import InvalidRequest

from .datasets import DataSet, Picture, images_in

_TRAIN = "imagenet/images/train"
_DESCRIPTIONS = "descriptions.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """One of the data sets: its folder, what in it has to be there, how it is read, and its templates."""

    name: str
    folder: str
    images: str
    labels: str
    read: Callable[[Known, Path, bool], DataSet]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    def missing(self, root: Path, *, shots: bool) -> Path | None:
        """Return the first thing that this data set needs and that is not there."""
        needed = [root / self.folder / name for name in (self.images, self.labels)]
        needed += [root / _TRAIN] * (shots and self.read is _imagenet)
        return next((path for path in needed if not path.exists()), None)

    def load(self, root: Path, *, shots: bool) -> DataSet:
        """Return its pictures; those to draw shots from only if they are asked for.

        Raises:
            InvalidRequest: a file of it is not what it should be.
        """
        return self.read(self, root, shots)

    def classes(self, root: Path, names: Sequence[str], ids: Sequence[object]) -> tuple[ClassSpec, ...]:
        """Return the classes with every prompt spelled out; a name that two of them share is told apart by the id."""
        shared = {name for name, count in Counter(names).items() if count > 1}
        sentences = _descriptions(root / self.folder / _DESCRIPTIONS)
        try:
            return tuple(
                ClassSpec(
                    name=class_name(f"{name} ({own})" if name in shared else name),
                    prompts=prompts_of(name, self.templates, sentences.get(name, ())),
                )
                for name, own in zip(names, ids, strict=True)
            )
        except InvalidRequest as error:
            raise InvalidRequest(f"{root / self.folder / self.labels} names a class wrongly: {error}") from error


def chosen(names: Iterable[str]) -> tuple[Known, ...]:
    """Return the data sets of these names or folders; all of them for none.

    Raises:
        InvalidRequest: there is none of a name.
    """
    by_name = {key.lower(): known for known in PAPER for key in (known.name, known.folder)}
    wanted = [name.strip().lower() for name in names]
    for name in wanted:
        if name not in by_name:
            raise InvalidRequest(f"There is no data set {name!r}; choose from {', '.join(k.folder for k in PAPER)}.")
    return tuple(dict.fromkeys(by_name[name] for name in wanted)) or PAPER


# A split file ---------------------------------------------------------------------------------------------------------


def _split_file(known: Known, root: Path, _shots: bool) -> DataSet:  # noqa: FBT001 - one signature for all readers
    file = root / known.folder / known.labels
    split = _json(file)
    if not isinstance(split, dict) or not all(isinstance(split.get(part), list) for part in ("train", "test")):
        raise InvalidRequest(f"{file} is no split file: it needs the lists 'train' and 'test'.")
    names: dict[int, str] = {}
    parts = {name: [_item(file, one, names) for one in split[name]] for name in ("train", "test")}
    if not names or sorted(names) != list(range(len(names))) or not parts["test"]:
        raise InvalidRequest(
            f"{file} has labels {_short(sorted(names))}; they have to be 0, 1, 2 and so on, without gaps."
        )
    images = root / known.folder / known.images
    ordered = [names[label] for label in range(len(names))]
    return DataSet(
        name=known.name,
        classes=known.classes(root, ordered, range(len(names))),
        templates=(),
        train=tuple(Picture(path=images / path, label=label) for path, label in parts["train"]),
        test=tuple(Picture(path=images / path, label=label) for path, label in parts["test"]),
    )


def _item(file: Path, one: Any, names: dict[int, str]) -> tuple[str, int]:
    """Return a picture's path and label, and note the name of its class."""
    match one:
        case [str(path), int(label), str(name)] if not isinstance(label, bool):
            _inside(file, path)
        case _:
            raise InvalidRequest(f"{file} has the item {_short(one)}; expected [path, label, class name].")
    if names.setdefault(label, name) != name:
        raise InvalidRequest(f"{file} calls the class {label} both {_short(names[label])} and {_short(name)}.")
    return path, label


def _inside(file: Path, path: str) -> None:
    """Return if a path stays in its folder; links in it are the owner's affair."""
    told = PurePosixPath(path)
    odd = "\0" in path or path != path.encode(errors="ignore").decode()
    if odd or told.is_absolute() or ".." in told.parts or not told.name:
        raise InvalidRequest(f"{file} names the picture {_short(path)}, which is not inside its folder.")


# Lists of pictures ----------------------------------------------------------------------------------------------------


def _lists(known: Known, root: Path, _shots: bool) -> DataSet:  # noqa: FBT001 - as in _split_file
    folder = root / known.folder
    names = _lines(folder / "variants.txt")
    labels = {name: label for label, name in enumerate(names)}

    def pictures(part: str) -> tuple[Picture, ...]:
        file, found = folder / known.labels.replace("test", part), []
        for line in _lines(file):
            stem, _, name = line.partition(" ")
            if name not in labels:
                raise InvalidRequest(f"{file} has the line {_short(line)}, whose class is not in variants.txt.")
            _inside(file, stem)
            found.append(Picture(path=folder / known.images / f"{stem}.jpg", label=labels[name]))
        return tuple(found)

    return DataSet(
        name=known.name,
        classes=known.classes(root, names, range(len(names))),
        templates=(),
        train=pictures("train"),
        test=pictures("test"),
    )


# The ImageNets --------------------------------------------------------------------------------------------------------


def _imagenet(known: Known, root: Path, shots: bool) -> DataSet:  # noqa: FBT001 - as in _split_file
    """Return the pictures in folders by synset, or by the synset's place in the list of names; some may be left out."""
    file = root / known.folder / known.labels
    names = dict(_named(file, line) for line in _lines(file))
    places, images = list(names), root / known.folder / known.images
    folders = {}
    for folder in sorted(path for path in images.iterdir() if path.is_dir() and not path.name.startswith(".")):
        number = int(folder.name) if folder.name.isdecimal() else len(places)
        synset = places[number] if number < len(places) else folder.name
        if synset not in names:
            raise InvalidRequest(f"{folder} is a class that {file} does not name.")
        folders[synset] = folder
    synsets = [synset for synset in places if synset in folders]
    if not synsets:
        raise InvalidRequest(f"{images} holds no folders of classes.")
    return DataSet(
        name=known.name,
        classes=known.classes(root, [names[synset] for synset in synsets], synsets),
        templates=(),
        train=_of_folders([root / _TRAIN / synset for synset in synsets]) if shots else (),
        test=_of_folders([folders[synset] for synset in synsets]),
    )


def _named(file: Path, line: str) -> tuple[str, str]:
    synset, _, name = line.partition(" ")
    if not name:
        raise InvalidRequest(f"{file} has the line {_short(line)}; expected a synset and a name.")
    return synset, name


def _of_folders(folders: Sequence[Path]) -> tuple[Picture, ...]:
    return tuple(Picture(path=path, label=label) for label, folder in enumerate(folders) for path in images_in(folder))


# Files ----------------------------------------------------------------------------------------------------------------


def _descriptions(file: Path) -> Mapping[str, Sequence[str]]:
    if not file.exists():
        return {}
    match _json(file):
        case dict(found) if all(_is_texts(texts) for texts in found.values()):
            return found
        case _:
            raise InvalidRequest(f"{file} has to hold a list of sentences for each class name.")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{file} cannot be read as JSON: {error}.") from error


def _lines(file: Path) -> list[str]:
    lines = [line.strip() for line in _text(file).splitlines() if line.strip()]
    if not lines:
        raise InvalidRequest(f"{file} is empty.")
    return lines


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file} is not written in UTF-8.") from error


def _short(value: object) -> str:
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:77]}..."  # noqa: PLR2004 - of a line


def _split(name: str, folder: str, images: str, labels: str, *templates: str) -> Known:
    return Known(
        name=name,
        folder=folder,
        images=images,
        labels=f"split_zhou_{labels}.json",
        read=_split_file,
        templates=templates or DEFAULT_TEMPLATES,
    )


def _shifted(name: str, folder: str, images: str) -> Known:
    return Known(name=name, folder=folder, images=images, labels="classnames.txt", read=_imagenet)


PAPER = (
    _shifted("ImageNet", "imagenet", "images/val"),
    _split("Caltech101", "caltech-101", "101_ObjectCategories", "Caltech101"),
    _split("OxfordPets", "oxford_pets", "images", "OxfordPets", "a photo of a {}, a type of pet."),
    _split("StanfordCars", "stanford_cars", ".", "StanfordCars", "a photo of a {}, a type of car."),
    _split("Flowers102", "oxford_flowers", "jpg", "OxfordFlowers", "a photo of a {}, a type of flower."),
    _split("Food101", "food-101", "images", "Food101", "a photo of {}, a type of food."),
    Known(
        name="FGVCAircraft",
        folder="fgvc_aircraft",
        images="images",
        labels="images_variant_test.txt",
        read=_lists,
        templates=("a photo of a {}, a type of aircraft.",),
    ),
    _split("SUN397", "sun397", "SUN397", "SUN397"),
    _split("DTD", "dtd", "images", "DescribableTextures", "{} texture."),
    _split("EuroSAT", "eurosat", "2750", "EuroSAT", "a centered satellite photo of {}."),
    _split("UCF101", "ucf101", "UCF-101-midframes", "UCF101", "a photo of a person doing {}."),
    _shifted("ImageNetV2", "imagenetv2", "imagenetv2-matched-frequency-format-val"),
    _shifted("ImageNet-Sketch", "imagenet-sketch", "images"),
    _shifted("ImageNet-A", "imagenet-adversarial", "imagenet-a"),
    _shifted("ImageNet-R", "imagenet-rendition", "imagenet-r"),
)
"""The eleven data sets of the paper, and ImageNet shifted in four ways."""
