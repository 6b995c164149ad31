"""Schemathesis asks a running service for what `/openapi.json` promises; `tests/soak/contract.py` asks for longer."""

from __future__ import annotations

import pytest

from service.stores.embedded import find_binary
from tests.soak.contract import FORMS, contract

BINARY = find_binary()
EXAMPLES = 2
SEED = 0
"""The same calls each time: what is found by chance is the soak's to find."""


@pytest.mark.skipif(BINARY is None, reason="no Valkey or Redis server is installed")
@pytest.mark.parametrize("form", FORMS)
def test_every_answer_is_as_the_document_says(form: str) -> None:
    assert BINARY is not None
    found = contract(form, BINARY, examples=EXAMPLES, seed=SEED)
    assert found.holds, found.report
    assert found.operations >= 34
    assert found.cases > 300
