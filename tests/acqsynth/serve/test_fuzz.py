"""Requests made up from the schema, right and wrong ones: none ends in a 500, and the schema tells the truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from acqsynth.serve.app import Service, create_app
from acqsynth.serve.auth import Access

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_ends_in_a_500(
    serve: Callable[..., Service],
    on_socket: Callable[[Any], str],
    forwards: list[int],
    mode: GenerationMode,
    tmp_path: Path,
) -> None:
    service = serve(root=tmp_path, access=Access(None, "admin"), limits={"max_body": 1 << 16, "max_samples": 16})
    app = create_app(service)
    address = on_socket(app)
    schema = schemathesis.openapi.from_dict(app.openapi())
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {operation.path for operation in operations} == {"/score", "/get_reward", "/student", "/health", "/metrics"}
    statuses: Counter[int] = Counter()
    with requests.Session() as session:
        for operation in operations:
            if mode == GenerationMode.NEGATIVE and operation.method == "get":
                continue  # nothing of such a request can be wrong

            @hypothesis.seed(0)
            @hypothesis.settings(
                max_examples={"/score": 80, "/get_reward": 40, "/student": 40}.get(operation.path, 3),
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
                phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Case) -> None:
                headers = {"Authorization": "Bearer admin"} if case.path == "/student" else {}
                response = case.call(base_url=address, session=session, headers=headers)
                statuses[response.status_code] += 1
                case.validate_response(response, checks=CHECKS)

            check()
    if mode == GenerationMode.POSITIVE:
        assert statuses[200] > 30, statuses
        assert len(forwards) > 10
    else:
        assert statuses[422] > 60, statuses
