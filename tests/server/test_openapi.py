"""The server against its own OpenAPI document: schemathesis makes up requests, and none may end in a 500."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from live_server import MODEL, LiveServer
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from infinilm.server.app import create_app
from infinilm.server.settings import Settings

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


def examine(server: LiveServer, operation: Any, mode: Any, max_examples: int) -> Counter[int]:
    """Send made-up requests to an operation and check every answer. Return how often it gave each status."""
    statuses: Counter[int] = Counter()

    @hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), data=strategies.data())
    def check(case: Any, data: Any) -> None:
        if mode is schemathesis.GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = _likely(case.body, data)
        statuses[case.call_and_validate(checks=CHECKS).status_code] += 1

    check()
    return statuses


def _likely(body: dict[str, Any], data: Any) -> dict[str, Any]:
    """Return a body with a chance to be served: the model there is, few tokens, and no more than two options.

    The document has types; numbers out of range and options that contradict each other are what most others end with.
    """
    options = sorted(body.keys() - {"model", "prompt", "messages", "max_tokens"})
    kept = data.draw(strategies.lists(strategies.sampled_from(options), max_size=2)) if options else []
    needed = {name: body[name] for name in ("prompt", "messages", *kept) if name in body}
    return {**needed, "model": MODEL, "max_tokens": 3}


def examine_all(server: LiveServer, max_examples: int) -> dict[str, Counter[int]]:
    """Examine every operation, with requests as the document has them and with others."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found: dict[str, Counter[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        num_examples = max_examples if operation.method == "post" else 10
        modes = schemathesis.GenerationMode
        wanted = [modes.POSITIVE, modes.NEGATIVE] if operation.method == "post" else [modes.POSITIVE]
        found[operation.label] = sum((examine(server, operation, mode, num_examples) for mode in wanted), Counter())
    server.wait_until_idle()
    return found


OPERATIONS = {
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /health",
    "GET /metrics",
    "GET /version",
    "POST /v1/completions",
    "POST /v1/chat/completions",
}


def test_no_made_up_request_ends_in_a_server_error(server: LiveServer) -> None:
    statuses = examine_all(server, 60)
    assert statuses.keys() == OPERATIONS
    for path in ("POST /v1/completions", "POST /v1/chat/completions"):
        assert min(statuses[path][200], statuses[path][400]) > 5, statuses


@pytest.mark.slow
def test_no_made_up_request_of_many_ends_in_a_server_error(server: LiveServer) -> None:
    examine_all(server, 1000)


def test_document_names_every_kind_of_answer(server: LiveServer) -> None:
    document = create_app(server.engine, Settings(served_model_names=("x",))).openapi()
    for path in ("/v1/completions", "/v1/chat/completions"):
        answers = document["paths"][path]["post"]["responses"]
        assert answers.keys() == {"200", "4XX", "500", "503", "504"}
        assert answers["200"]["content"].keys() == {"application/json", "text/event-stream"}
        assert answers["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
