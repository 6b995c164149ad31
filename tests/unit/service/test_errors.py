"""Every refusal has a problem type, and every problem type a meaning."""

from __future__ import annotations

import pytest

from service import errors
from service.errors import Contended, ServiceError, StoreAway, StoreDown
from service.images import decode
from service.images.errors import ImageFault
from service.problem_types import PROBLEMS

FIXED = {
    "invalid-request": 422,
    "unsupported-media-type": 415,
    "image-unreadable": 422,
    "image-too-large": 413,
    "body-too-large": 413,
    "too-many-images": 413,
    "not-found": 404,
    "method-not-allowed": 405,
    "unknown-tenant": 404,
    "unknown-class": 404,
    "unknown-shot": 404,
    "unknown-slot": 404,
    "unknown-job": 404,
    "unknown-snapshot": 404,
    "no-classes": 409,
    "duplicate-class": 422,
    "limit-exceeded": 422,
    "fingerprint-mismatch": 409,
    "idempotency-conflict": 422,
    "unauthenticated": 401,
    "forbidden": 403,
    "rate-limited": 429,
    "queue-full": 503,
    "draining": 503,
    "store-down": 503,
    "deadline-exceeded": 504,
    "internal": 500,
}
"""The surface that clients rely on."""

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServiceError)]
WORDED = (Contended,)
"""Refusals that bring their own words."""

FAULTS = [
    kind
    for kind in vars(decode).values()
    if isinstance(kind, type) and issubclass(kind, ImageFault) and kind is not ImageFault
]


def test_the_problem_types_and_their_statuses_are_the_fixed_ones() -> None:
    assert {slug: kind.status for slug, kind in PROBLEMS.items()} == FIXED


@pytest.mark.parametrize("slug", PROBLEMS)
def test_every_problem_type_says_what_it_means_and_what_to_do(slug: str) -> None:
    kind = PROBLEMS[slug]
    assert kind.title
    assert not kind.title.endswith(".")
    assert kind.meaning.endswith(".")
    assert kind.remedy.endswith(".")


def test_titles_tell_problem_types_apart() -> None:
    assert len({kind.title for kind in PROBLEMS.values()}) == len(PROBLEMS)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_refusal_has_a_problem_type_and_keeps_its_detail(kind: type[ServiceError]) -> None:
    error = kind() if kind in WORDED else kind("Why.", retry_after_s=2.5)
    assert error.slug in PROBLEMS
    assert error.detail == str(error)
    if kind not in WORDED:
        assert (error.detail, error.retry_after_s) == ("Why.", 2.5)
        assert kind("Why.").retry_after_s is None


def test_no_two_refusals_share_a_problem_type_but_those_of_the_store() -> None:
    own = [kind.slug for kind in ERRORS if kind not in (ServiceError, StoreAway, Contended)]
    assert len(set(own)) == len(own)


@pytest.mark.parametrize("kind", [StoreAway, Contended])
def test_whatever_the_store_does_not_do_is_one_problem_to_a_caller(kind: type[ServiceError]) -> None:
    assert issubclass(kind, StoreDown)
    assert kind.slug == StoreDown.slug == "store-down"


def test_who_meets_a_tenant_that_keeps_changing_is_told_to_come_again() -> None:
    assert Contended().retry_after_s
    assert Contended().detail.endswith(".")


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_every_fault_of_an_image_has_a_problem_type_of_the_same_status(kind: type[ImageFault]) -> None:
    assert PROBLEMS[kind.slug].status == kind.status
