"""Whatever the API's own document allows, and what it does not, is answered, as documented, without a 5xx."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.server.conftest import PATIENCE, Server

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/v1/models/{name}",
]
LENGTHS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}


@pytest.mark.parametrize("path", PATHS)
def test_the_document_holds(server: Server, path: str) -> None:
    document = server.ask("GET", "/openapi.json").raise_for_status().json()
    schema = schemathesis.openapi.from_dict(document)
    operation: Any = next(iter(schema[path].values()))
    checks = [not_a_server_error, status_code_conformance, response_schema_conformance]

    @settings(max_examples=25, suppress_health_check=SLOW)
    @given(case=operation.as_strategy(), short=st.integers(1, 3))
    def holds(case: Any, short: int) -> None:
        if isinstance(case.body, dict) and path in LENGTHS:  # a text may be long; the law is not about that
            case.body[LENGTHS[path]] = short
            case.body.pop("max_completion_tokens", None)
            case.body.pop("min_tokens", None)
            if isinstance(case.body.get("n"), int):
                case.body["n"] = min(case.body["n"], 4)
        if isinstance(case.body, dict) and short > 1 and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
        case.call_and_validate(base_url=server.url, checks=checks, timeout=PATIENCE)

    holds()


def test_the_document_names_every_endpoint(server: Server) -> None:
    document = server.ask("GET", "/openapi.json").json()
    assert set(PATHS) | {"/health", "/ready", "/metrics", "/version", "/v1/models"} == set(document["paths"])
    assert "422" not in str(document["paths"]["/v1/completions"]["post"]["responses"].keys())
