"""Who calls, and for which tenant."""

from __future__ import annotations

import pytest

from service.auth import named_tenant
from service.errors import InvalidRequest
from service.settings import DEFAULT_TENANT


@pytest.mark.parametrize(
    ("header", "query", "tenant"),
    [
        (None, None, DEFAULT_TENANT),
        ("a", None, "a"),
        (None, "b", "b"),
        ("a", "a", "a"),
    ],
)
def test_a_caller_names_its_tenant_by_header_or_query_or_is_the_default(
    header: str | None, query: str | None, tenant: str
) -> None:
    assert named_tenant(header, query) == tenant


@pytest.mark.parametrize(("header", "query"), [("a", "b"), ("a", ""), ("", "a"), ("a", "A")])
def test_a_caller_that_names_two_tenants_is_refused(header: str, query: str) -> None:
    with pytest.raises(InvalidRequest, match="different tenants"):
        named_tenant(header, query)


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "ä", "a" * 65, "a\n", "..", "{a}"])
def test_a_malformed_name_is_refused_wherever_it_stands(name: str) -> None:
    for header, query in ((name, None), (None, name), (name, name)):
        with pytest.raises(InvalidRequest):
            named_tenant(header, query)
