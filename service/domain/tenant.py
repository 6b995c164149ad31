"""Tenants: names, classes, and what a tenant decides for itself."""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from core.prompts import DEFAULT_TEMPLATES, PLACEHOLDER, prompts_of
from core.readout.fusion import DEFAULT_WEIGHTS, BranchWeights
from core.snapshot import DEFAULT_BETA, DEFAULT_SLOTS, Method
from service.errors import DuplicateClass, InvalidRequest, LimitExceeded, UnknownClass
from service.settings import TENANT_NAME, Settings

Retention = Literal["features", "images"]
"""What is kept of an uploaded shot: its feature, or its bytes too, so that another encoder can read it later."""

_SHADOW = "/next"
"""What no name of a tenant has in it."""

_TENANT_NAME = re.compile(TENANT_NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassSpec:
    """One class: its name and the sentences that describe it."""

    name: str
    prompts: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Hash of the name, under which everything of this class is kept."""
        return class_id(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantConfig:
    """What a tenant decides for itself."""

    classes: tuple[ClassSpec, ...] = ()
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    slots: int = DEFAULT_SLOTS
    beta: float = DEFAULT_BETA
    weights: BranchWeights = DEFAULT_WEIGHTS
    learn: bool = True
    retention: Retention = "features"
    method: Method = "auto"

    def prompts(self, spec: ClassSpec) -> tuple[str, ...]:
        """Return every prompt of a class: the templates filled with its name, and its own sentences."""
        return prompts_of(spec.name, self.templates, spec.prompts)

    @property
    def labelling(self) -> str:
        """Hash of whatever decides which label an image gets: classes and prompts, in any order of the classes."""
        said = sorted((spec.id, *self.prompts(spec)) for spec in self.classes)
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Return the configuration as a store keeps it; `dmn` is what versions knew that had no other method."""
        values = asdict(self)
        if self.method == "dmn":
            del values["method"]
        return json.dumps(values, ensure_ascii=False)

    @staticmethod
    def from_json(text: str | bytes) -> TenantConfig:
        """Return the configuration that `to_json` wrote."""
        values = {"method": "dmn", **json.loads(text)}
        classes = tuple(ClassSpec(name=one["name"], prompts=tuple(one["prompts"])) for one in values.pop("classes"))
        a1, a2, a3 = values.pop("weights")
        return TenantConfig(
            **{**values, "templates": tuple(values["templates"])}, classes=classes, weights=(a1, a2, a3)
        )

    def spec(self, name: str) -> ClassSpec:
        """Return the class of that name.

        Raises:
            UnknownClass: there is none.
        """
        for spec in self.classes:
            if spec.name == name:
                return spec
        raise UnknownClass(f"The tenant has no class {name!r}.")

    def with_classes(self, added: Sequence[ClassSpec]) -> TenantConfig:
        """Return the configuration with classes added at the end."""
        return replace(self, classes=(*self.classes, *added))

    def without(self, name: str) -> TenantConfig:
        """Return the configuration without a class.

        Raises:
            UnknownClass: there is none of that name.
        """
        gone = self.spec(name)
        return replace(self, classes=tuple(spec for spec in self.classes if spec is not gone))


def class_id(name: str) -> str:
    """Return the id of a class: a hash of its name, so that it stays the same wherever the class stands."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def tenant_name(name: str) -> str:
    """Return a tenant's name as given.

    Raises:
        InvalidRequest: it is no valid name.
    """
    if not _TENANT_NAME.fullmatch(name):
        raise InvalidRequest(
            "A tenant name starts with a letter or digit and has up to 64 letters, digits, dots, underscores, hyphens."
        )
    return name


def shadow_of(tenant: str) -> str:
    """Return the name of the memory that a tenant has under the next encoder (`service.tenants.migration`)."""
    return tenant + _SHADOW


def is_shadow(name: str) -> bool:
    """Return whether a name is that of such a memory, and so no tenant's."""
    return name.endswith(_SHADOW)


def class_name(name: str, limit: int = 256) -> str:
    """Return a class name, in Unicode's NFC and without space around it.

    Raises:
        InvalidRequest: it is empty, longer than `limit` characters, or holds a control character.
    """
    return _text(name, "A class name", limit)


def checked(config: TenantConfig, settings: Settings) -> TenantConfig:
    """Return a configuration with its names and sentences tidied.

    Raises:
        InvalidRequest: a value is malformed.
        DuplicateClass: a class is named twice.
        LimitExceeded: there are more classes, prompts or slots than allowed.
    """
    _at_most(len(config.classes), settings.max_classes, "classes")
    _at_most(len(config.templates), settings.max_prompts, "templates")
    _at_most(config.slots, settings.max_slots, "slots a class")
    limit = settings.max_text_chars
    templates = tuple(_text(template, "A template", limit) for template in config.templates)
    for template in templates:
        if PLACEHOLDER not in template:
            raise InvalidRequest(f"The template {template!r} has no {PLACEHOLDER} for the class name.")
    classes = tuple(_checked_class(spec, settings) for spec in config.classes)
    _unique(spec.name for spec in classes)
    for spec in classes:
        if not templates and not spec.prompts:
            raise InvalidRequest(
                f"The class {spec.name!r} has no prompt: there are no templates, and it has no sentences."
            )
    _check_numbers(config)
    return replace(config, classes=classes, templates=templates)


def _check_numbers(config: TenantConfig) -> None:
    if config.slots < 0:
        raise InvalidRequest("The number of slots must not be negative.")
    if not math.isfinite(config.beta) or config.beta < 0:
        raise InvalidRequest("beta must be a finite number, at least 0.")
    if any(not math.isfinite(weight) or weight < 0 for weight in config.weights) or not any(config.weights):
        raise InvalidRequest("The three weights must be finite, not negative, and not all zero.")


def _checked_class(spec: ClassSpec, settings: Settings) -> ClassSpec:
    name = class_name(spec.name, settings.max_text_chars)
    _at_most(len(spec.prompts), settings.max_prompts, f"prompts for the class {name!r}")
    prompts = tuple(_text(prompt, "A prompt", settings.max_text_chars) for prompt in spec.prompts)
    return ClassSpec(name=name, prompts=prompts)


def _unique(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DuplicateClass(f"The class {name!r} is named twice.")
        seen.add(name)


def _text(text: str, what: str, limit: int) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} is not valid Unicode.") from error
    tidy = unicodedata.normalize("NFC", text).strip()
    if not tidy:
        raise InvalidRequest(f"{what} is empty.")
    if len(tidy) > limit:
        raise InvalidRequest(f"{what} has {len(tidy)} characters; at most {limit} are allowed.")
    if any(unicodedata.category(char) == "Cc" for char in tidy):
        raise InvalidRequest(f"{what} holds a control character.")
    return tidy


def _at_most(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise LimitExceeded(f"{count} {what} were given; at most {limit} are allowed.")
