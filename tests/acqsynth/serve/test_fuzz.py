"""Valid and invalid requests generated from the schema, and arbitrary bodies: none causes a 500, and the schema is
accurate.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import Counter
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from fuzzing import SEED, fuzzed
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from acqsynth.serve.app import create_app
from acqsynth.serve.middleware import Access

CHECKS: list[Any] = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_ends_in_a_500(serve, on_socket, forwards, mode, tmp_path):
    service = serve(root=tmp_path, access=Access(None, "admin"), limits={"max_body": 1 << 16, "max_samples": 16})
    app = create_app(service)
    address = on_socket(app)
    schema = schemathesis.openapi.from_dict(app.openapi())
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {operation.path for operation in operations} == {"/score", "/get_reward", "/student", "/health", "/metrics"}
    statuses = Counter()
    with requests.Session() as session:
        for operation in operations:
            if mode == GenerationMode.NEGATIVE and operation.method == "get":
                continue  # such a request cannot be invalid

            @fuzzed(
                {"/score": 160, "/get_reward": 40, "/student": 40}.get(operation.path, 3),
                phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
                case=operation.as_strategy(generation_mode=mode),
            )
            def check(case):
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


texts = st.one_of(
    st.text(max_size=50),
    st.sampled_from(["", "\u200b", "\x00", "a" * 5000, "\U0001f98a" * 100, "<question>a</question><answer>b</answer>"]),
)
keys = st.sampled_from(
    [
        *("samples", "acquisitions", "acquisition_args", "reduction", "max_length", "text", "prompt", "completion"),
        *("messages", "role", "content", "tools", "tool_calls", "chat_template_kwargs", "query", "prompts", "labels"),
        *("path", "entropy"),
    ]
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys | texts, inner, max_size=4)),
    max_leaves=12,
)
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": texts | values}
    ),
    max_size=4,
)
samples = st.one_of(
    texts,
    st.fixed_dictionaries({"text": texts}),
    st.fixed_dictionaries({"prompt": texts | turns, "completion": texts | turns}),
    st.fixed_dictionaries({"messages": turns}, optional={"tools": values, "chat_template_kwargs": values}),
    values,
)
bodies = st.one_of(
    st.fixed_dictionaries({"samples": st.lists(samples, max_size=6)}, optional={"max_length": st.integers(2, 50)}),
    st.fixed_dictionaries({"query": st.lists(texts, max_size=4), "prompts": st.lists(texts, max_size=4)}),
    st.fixed_dictionaries({"path": texts}),
    st.dictionaries(keys, values, max_size=6),
    values,
)


class Bystander(threading.Thread):
    """Another client, which keeps requesting small scores.

    Attributes:
        waits: seconds until each answer.
        unloaded: median seconds of a few requests before the load starts.
    """

    def __init__(self, address):
        super().__init__(daemon=True)
        self.address, self.waits = address, [0.0]
        self.done = threading.Event()
        self.failed = []
        with requests.Session() as session:
            self.unloaded = statistics.median(self._ask(session) for _ in range(9))

    @property
    def allowed(self):
        """Maximum seconds per request: 2, or more on a machine that is busy with other work."""
        return max(2.0, 40 * self.unloaded)

    def run(self):
        try:
            with requests.Session() as session:
                while not self.done.wait(0.02):
                    self.waits.append(self._ask(session))
        except Exception as error:
            self.failed.append(error)

    def _ask(self, session):
        begin = time.monotonic()
        body = {"samples": ["a quick fox", "the dog"], "acquisitions": ["loss"]}
        response = session.post(self.address + "/score", json=body, headers=bearer("secret"), timeout=60)
        assert response.status_code == 200, response.text
        return time.monotonic() - begin


def bearer(token):
    return {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}


def test_no_body_ends_in_a_500(start, root, memory):
    """Bodies of up to 8 MiB take less than 2 seconds and 1 GiB and delay other clients by less than 2 seconds."""
    process, address = start("--student-root", str(root))
    statuses = Counter()
    other = Bystander(address)
    idle = memory(process, "VmRSS")
    other.start()
    with requests.Session() as session:

        @fuzzed(
            200,
            path=st.sampled_from(["/score", "/score", "/get_reward", "/student"]),
            body=st.one_of(bodies, st.just({"samples": ["the quick brown fox"], "acquisitions": ["entropy"]})),
            cut=st.one_of(st.none(), st.integers(0, 200)),
            junk=st.binary(max_size=4),
            size=st.sampled_from([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 << 12, 1 << 16, 1 << 20, 8 << 20]),
        )
        def check(path: str, body: Any, cut: int | None, junk: bytes, size: int) -> None:
            raw = json.dumps(body).encode()
            if cut is not None:
                raw = raw[:cut] + junk * max(1, (size - len(raw)) // max(1, len(junk))) + raw[cut + 1 :]
            headers = bearer("admin" if path == "/student" else "secret")
            begin = time.monotonic()
            response = session.post(address + path, data=raw, headers=headers, timeout=60)
            assert time.monotonic() - begin < other.allowed
            statuses[response.status_code] += 1
            assert response.status_code in (200, 400, 413, 422), response.text
            if response.status_code != 200:
                assert set(response.json()) == {"error"}
                assert len(response.content) < 2000
            assert max(other.waits) < other.allowed, f"another client waited {max(other.waits)} s"
            assert not other.failed
            assert memory(process, "VmHWM") - idle < 1024

        check()
    other.done.set()
    other.join()
    assert len(other.waits) > 10
    assert statuses[200] > 10, statuses
    assert statuses[400] > 10, statuses
    assert statuses[422] > 10, statuses
    print(
        f"[fuzz] seed {SEED}: {statuses.total()} bodies, another client waited {max(other.waits):.2f} s at most "
        f"({other.unloaded:.3f} s unloaded), memory grew by {memory(process, 'VmHWM') - idle:.0f} MiB"
    )
