"""What the OpenAPI document says beyond what the framework reads off the code."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from service.api.schemas.jobs import JobOut
from service.api.schemas.memory import TrainIn
from service.api.schemas.tenants import TenantOut
from service.app import create_app
from service.domain.records import Job, JobState
from service.domain.tenant import TenantConfig
from service.problem_types import PROBLEMS
from service.settings import Settings


def document(**settings: Any) -> dict[str, Any]:
    return create_app(Settings(store="memory", **settings)).openapi()


def test_limits_are_those_of_the_settings() -> None:
    told = document(max_images=3, max_views=5, max_classes=7, max_text_chars=11, max_slots=13)
    operation = told["paths"]["/classify"]["post"]
    for kind in ("multipart/form-data", "application/json"):
        assert operation["requestBody"]["content"][kind]["schema"]["properties"]["images"]["maxItems"] == 3
    (views,) = [one["schema"] for one in operation["parameters"] if one["name"] == "views"]
    assert views["maximum"] == 5
    tenant = told["components"]["schemas"]["TenantIn"]["properties"]
    assert (tenant["classes"]["maxItems"], tenant["slots"]["maximum"]) == (7, 13)
    assert tenant["templates"]["items"]["maxLength"] == 11


def test_the_bounds_of_whole_numbers_are_documented() -> None:
    schemas = document()["components"]["schemas"]
    epochs, slots = schemas["TrainIn"]["properties"]["epochs"], schemas["TenantIn"]["properties"]["slots"]
    assert (epochs["type"], epochs["minimum"], epochs["maximum"]) == ("integer", 1, 1000)
    assert (slots["type"], slots["minimum"]) == ("integer", 0)


@pytest.mark.parametrize("auth", ["open", "keys"])
def test_nothing_that_is_said_among_ourselves_is_left_in_the_document(auth: str) -> None:
    told = document(auth=auth)
    for word in ("x-limits", "x-problems", "x-required", "HTTPValidationError"):
        assert word not in json.dumps(told["paths"])
    assert told == document(auth=auth)


@pytest.mark.parametrize("auth", ["open", "keys"])
def test_every_problem_is_documented_somewhere_and_none_under_another_status(auth: str) -> None:
    found = set()
    for item in document(auth=auth)["paths"].values():
        for operation in item.values():
            for status, answer in operation["responses"].items():
                problem = answer.get("content", {}).get("application/problem+json")
                for type_ in problem["schema"]["allOf"][1]["properties"]["type"]["enum"] if problem else ():
                    slug = type_.removeprefix("/problems/")
                    assert PROBLEMS[slug].status == int(status)
                    found.add(slug)
    assert found == set(PROBLEMS) - ({"unauthenticated"} if auth == "open" else set())


def test_who_has_no_key_is_told_how_to_show_one_and_who_is_too_fast_how_long_to_wait() -> None:
    answers = document(auth="keys")["paths"]["/classify"]["post"]["responses"]
    assert answers["401"]["headers"]["WWW-Authenticate"]["required"]
    assert answers["429"]["headers"]["Retry-After"]["required"]
    assert "Retry-After" in answers["503"]["headers"]


def test_a_job_says_all_of_itself_also_inside_of_a_tenant_and_no_job_is_left_out() -> None:
    job = Job(id="1", kind="rescore", state=JobState.RUNNING, progress=0.5, created=0.0, updated=0.0)
    with_job, without = (TenantOut.of("shop", TenantConfig(), one).model_dump(mode="json") for one in (job, None))
    assert with_job["job"].keys() == JobOut.model_fields.keys()
    assert "job" not in without


def test_a_whole_number_may_have_a_point_and_must_be_a_number() -> None:
    assert TrainIn.model_validate({"seed": 2.0}).seed == 2
    for seed in (2.5, "2", True):
        with pytest.raises(ValidationError):
            TrainIn.model_validate({"seed": seed})
