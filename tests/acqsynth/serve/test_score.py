"""``/score`` returns the values of in-process scoring and rejects bad requests with a typed error."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from fakes import error_of

import acqcore
from acqsynth.serve.schema import served_acquisitions
from acqsynth.serve.students import Question

CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]


def test_all_acquisitions_are_those_of_process(post, student, samples):
    names = served_acquisitions()
    response = post("/score", {"samples": samples, "acquisitions": names})
    assert response.status_code == 200
    answer = response.json()
    expected = acqcore.score(student, samples, names, progress=False)
    assert list(answer["values"]) == names
    for name in names:
        assert torch.equal(torch.tensor(answer["values"][name]), expected[name]), name
    assert answer["n_tokens"] == expected.n_tokens.tolist()
    assert answer["valid"] == [True] * len(samples)
    assert answer["errors"] == []
    assert answer["student"]["name"] == "first"
    assert answer["student"]["version"] == 1


CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": [2]}}}
CALLED = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "name": "add", "tool_call_id": "a"},
    CHAT[1],
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    "chosen",
    [
        ["What is 2 + 2?", "It is 4."],
        ["\x00\x01\x7f", "\U0001f642 日本", "\u202e\ufeff", "</s></s>"],
        [{"text": "What is 2 + 2?"}, {"text": "It is 4."}],
        [{"messages": CHAT}, {"messages": [*CHAT, *CHAT]}],
        [{"messages": [{**CHAT[0], "weight": 1}, CHAT[1]]}],
        [{"messages": CALLED, "tools": TOOLS}, {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}}],
        [{"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt": "a", "completion": "b"}],
        [{"question": "What is 2 + 2?", "answer": 40000}],
    ],
    ids=["texts", "control characters", "text", "messages", "extra keys", "tools", "prompts", "rows"],
)
def test_every_kind_of_sample(post, student, chosen):
    answer = post("/score", {"samples": chosen, "acquisitions": "loss"}).json()
    expected = acqcore.score(student, chosen, "loss", progress=False)
    assert answer["errors"] == []
    assert answer["values"]["loss"] == expected["loss"].tolist()
    assert answer["n_tokens"] == expected.n_tokens.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"chat_template": "{{ 1 }}"},
        {"tokenize": True},
        {"add_generation_prompt": True},
        {"conversation": "x"},
        {"a b": 1},
        {"x": {"y": 1}},
    ],
)
def test_a_request_brings_no_template_of_its_own(post, forwards, options):
    body = {"samples": [{"messages": CHAT, "chat_template_kwargs": options}]}
    status, kind, text = error_of(post("/score", body))
    assert (status, kind) == (422, "invalid_request")
    assert "chat_template_kwargs" in text
    assert forwards == []


def test_reduction_arguments_and_length(post, student, samples):
    arguments = {"mutual_information": {"layers": 1, "draws": 3, "seed": 5}, "grad_norm": {"parameters": "all"}}
    names = ["mutual_information", "grad_norm", "entropy"]
    body = {"samples": samples, "acquisitions": names, "acquisition_args": arguments}
    answer = post("/score", {**body, "reduction": "max", "max_length": 20}).json()
    expected = acqcore.score(
        student, samples, names, acquisition_args=arguments, reduction="max", max_length=20, progress=False
    )
    for name in names:
        assert answer["values"][name] == expected[name].tolist()


def test_estimates_come_with_their_standard_errors(post, student, samples):
    arguments = {"mutual_information": {"form": "linear", "probes": 3, "seed": 5}}
    names = ["entropy", "mutual_information"]
    body = {"samples": samples, "acquisitions": names, "acquisition_args": arguments}
    answer = post("/score", body).json()
    expected = acqcore.score(student, samples, names, acquisition_args=arguments, progress=False)
    assert answer["values"]["mutual_information"] == expected["mutual_information"].tolist()
    assert answer["stderr"] == {"mutual_information": expected.stderr["mutual_information"].tolist()}
    single = {**arguments["mutual_information"], "probes": 1}
    answer = post("/score", {**body, "acquisition_args": {"mutual_information": single}}).json()
    assert answer["stderr"] == {"mutual_information": [None] * len(samples)}
    assert post("/score", {"samples": samples}).json()["stderr"] == {}


def test_coalesced_requests_get_the_numbers_of_lone_ones(asked, serve, student, samples, forwards):
    """Values agree up to rounding, as matrix products of another shape sum in another order."""
    names = ["entropy", "loss", "grad_norm", "mutual_information"]

    async def main():
        async with asked(serve(limits={"wait": 0.2})) as client:
            bodies = [{"samples": [sample], "acquisitions": names} for sample in samples]
            return await asyncio.gather(*(client.post("/score", json=body) for body in bodies))

    answers = [response.json() for response in asyncio.run(main())]
    assert sum(size == len(samples) for size in forwards) <= 1
    assert len(forwards) < len(samples)
    for sample, answer in zip(samples, answers, strict=True):
        expected = acqcore.score(student, [sample], names, progress=False)
        for name in names:
            assert answer["values"][name] == pytest.approx(expected[name].tolist(), rel=2e-6)


def test_a_sample_that_can_not_be_scored_is_told_alone(post, student):
    chosen = ["a fox", "x", "", "the dog " * 20, "the dog"]
    body = {"samples": chosen, "acquisitions": ["entropy"]}
    answer = post("/score", body, limits={"max_length": 64}).json()
    expected = acqcore.score(student, [chosen[0], chosen[4]], "entropy", progress=False)["entropy"].tolist()
    assert answer["values"]["entropy"] == [expected[0], None, None, None, expected[1]]
    assert answer["valid"] == [True, False, False, False, True]
    assert [error["index"] for error in answer["errors"]] == [1, 2, 3]
    assert answer["errors"][0]["message"].startswith("nothing to score")
    assert answer["errors"][2]["message"].startswith("160 tokens, the student takes at most 64")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (3, "expected strings, mappings with"),
        (None, "expected strings, mappings with"),
        ({"prompt": "a"}, "got a mapping with keys 'prompt'"),
        ({"text": ["a"]}, "text: expected a string, got list"),
        ({"text": None}, "text: expected a string, got no value"),
        ({"text": "\ud800 is half a character"}, "text: character 0 is the lone surrogate U+D800"),
        ({"messages": [{"role": "user", "content": "a"}]}, "expected text as in the samples before it"),
        ({"text": "a" * 70_000}, "70004 characters, at most 65536 are tokenized"),
    ],
)
def test_the_fault_of_a_sample_is_its_own(post, student, bad, message):
    good = [{"text": "a fox", "id": 1}, {"text": "the dog", "weight": 0.5}]
    body = json.dumps({"samples": [good[0], bad, good[1]], "acquisitions": "entropy"}).encode()
    answer = post("/score", body).json()
    expected = acqcore.score(student, good, "entropy", progress=False)["entropy"].tolist()
    assert answer["values"]["entropy"] == [pytest.approx(expected[0]), None, pytest.approx(expected[1])]
    assert answer["valid"] == [True, False, True]
    [error] = answer["errors"]
    assert error["index"] == 1
    assert message in error["message"]


def test_a_value_that_is_not_finite_is_null(post, student, monkeypatch):
    with torch.no_grad():
        student.head.weight[ord("?")] = torch.nan
    answer = post("/score", {"samples": ["a fox"], "acquisitions": ["entropy"]})
    assert answer.json()["values"] == {"entropy": [None]}
    assert answer.json()["valid"] == [False]


def test_no_samples(post):
    answer = post("/score", {"samples": []}).json()
    assert answer["values"] == {"entropy": []}
    assert answer["valid"] == answer["n_tokens"] == answer["errors"] == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "samples: Field required"),
        ([], "body: "),
        ({"samples": "a"}, "samples: Input should be a valid array"),
        ({"samples": ["a"], "more": 1}, "more: Extra inputs are not permitted"),
        ({"samples": ["a"], "acquisitions": ["influence"]}, "acquisitions.0: unknown 'influence', expected one of"),
        (
            {"samples": ["ab"], "acquisitions": ["grad_norm"], "acquisition_args": {"grad_norm": {"parameters": 0}}},
            "grad_norm.parameters: Input should be 'head', 'trainable' or 'all', or Input should be greater than",
        ),
        ({"samples": ["a"], "acquisitions": []}, "acquisitions: List should have at least 1 item"),
        ({"samples": ["a b"], "reduction": "median"}, "reduction: Input should be 'mean'"),
        ({"samples": ["a b"], "max_length": 1}, "max_length: "),
        ({"samples": ["a b"], "max_length": "9"}, "max_length: Input should be a valid integer"),
        ({"samples": ["a b"], "max_length": 10**6}, "max_length: expected at most 2048"),
        ({"samples": ["a b"], "acquisition_args": {"grad_norm": {}}}, "not among the acquisitions asked for"),
        (
            {"samples": ["ab"], "acquisitions": ["mutual_information"],
             "acquisition_args": {"mutual_information": {"members": ["x"]}}},
            "Extra inputs are not permitted",
        ),
        (
            {"samples": ["ab"], "acquisitions": ["mutual_information"],
             "acquisition_args": {"mutual_information": {"layers": 3}}},
            "layers",
        ),
        (
            {"samples": ["ab"], "acquisitions": ["mutual_information"],
             "acquisition_args": {"mutual_information": {"draws": 2, "block": 10**20}}},
            "block: expected an int below 2**63",
        ),
    ],
)  # fmt: skip
def test_bad_requests(post, forwards, body, message):
    status, kind, text = error_of(post("/score", body))
    assert (status, kind) == (422, "invalid_request")
    assert message in text
    assert sum(forwards) <= 1  # a few tokens are run to find the blocks that ``layers`` counts


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b'{"samples": ["a b"]', 400),
        (b"\xff\xfe", 400),
        (b'{"samples": ["\xff"]}', 400),
        (b'{"samples": ["\\ud800 is half a character"', 400),
        (b'{"samples": ["a b"], "reduction": "\\ud800"}', 422),
        (b'{"samples": NaN}', 422),
        (b'{"samples": ["a b"], "max_length": Infinity}', 422),
        (b'{"samples": ["a b"], "max_length": 1e999}', 422),
        (b'{"samples": ["a b"], "max_length": ' + b"9" * 400 + b"}", 422),
        (b'{"samples": ["a b"], "max_length": ' + b"9" * 5000 + b"}", 400),
        (b'{"samples": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"samples": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", 400),
    ],
)
def test_bodies_that_are_no_request(post, body, status):
    got, kind, _ = error_of(post("/score", body))
    assert got == status
    assert kind == {400: "bad_request", 422: "invalid_request"}[status]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_what_a_web_page_may_send_elsewhere_is_no_request(post, forwards, kind):
    response = post("/score", b'{"samples": ["a b"]}', kind)
    assert error_of(response) == (422, "invalid_request", "content-type: expected application/json")
    assert forwards == []


@pytest.mark.parametrize("kind", ["Application/JSON; charset=utf-8", "application/vnd.scores+json"])
def test_json_by_its_other_names(post, kind):
    assert post("/score", b'{"samples": ["a b"]}', kind).json()["valid"] == [True]


def test_limits_of_a_request(post, forwards):
    limits = {"max_samples": 2, "queue_tokens": 20, "max_body": 1000}
    for body, message in (
        ({"samples": ["a b"] * 3}, "samples: expected at most 2, got 3"),
        ({"samples": ["a b" * 8]}, "the request has 24 tokens, but the queue holds at most 20"),
        ({"samples": ["a" * 1000]}, "the body has 1016 bytes, at most 1000 are allowed"),
    ):
        status, kind, text = error_of(post("/score", body, limits=limits))
        assert (status, kind) == (413, "too_large")
        assert message in text
    assert forwards == []


def test_a_failure_of_the_model_is_500_without_its_words(post, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("out of memory at 0x7f")

    monkeypatch.setattr(Question, "values", fail)
    status, kind, text = error_of(post("/score", {"samples": ["a b"]}))
    assert (status, kind) == (500, "internal")
    assert "memory" not in text
    assert "out of memory" in caplog.text
