from __future__ import annotations

import inspect

import pytest

from core import errors

EVERY = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", EVERY)
def test_every_refusal_is_a_core_error(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.CoreError)


@pytest.mark.parametrize("kind", [errors.InvalidFeature, errors.InvalidStream, errors.InvalidImage])
def test_what_is_wrong_with_a_value_is_a_value_error(kind: type[Exception]) -> None:
    assert issubclass(kind, ValueError)


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__ is not None
    for kind in EVERY:
        assert kind.__name__ in errors.__doc__


def test_every_error_says_what_happened() -> None:
    for kind in EVERY:
        assert kind.__doc__
